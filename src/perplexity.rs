//! Perplexity and KL divergence by llama-perplexity's rules.
