//! Bindings to ggml and llama.cpp.
