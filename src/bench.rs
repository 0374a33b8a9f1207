//! Speed as llama-bench measures it, with the machine's limits beside it.
