//! Generates the bindings and compiles the shim. llama.cpp itself is built by llama-cpp-sys-2,
//! whose build script has run before this one and says where it put the headers.

use std::env;
use std::path::PathBuf;

fn main() {
    for file in ["build.rs", "wrapper.h", "shim.c"] {
        println!("cargo:rerun-if-changed={file}");
    }
    let root = env::var("DEP_LLAMA_ROOT")
        .expect("llama-cpp-sys-2 says where it built llama.cpp (DEP_LLAMA_ROOT)");
    let include = PathBuf::from(root).join("include");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));

    bindgen::Builder::default()
        .header("wrapper.h")
        .clang_arg(format!("-I{}", include.display()))
        .allowlist_item("(de)?quantize_.*|(ggml|gguf|llama|GGML|GGUF|LLAMA)_.*")
        .prepend_enum_name(false)
        .generate_comments(false)
        .generate()
        .unwrap_or_else(|error| {
            panic!(
                "bindgen cannot read ggml's headers: {error}\n\
                 It needs libclang (Debian: apt-get install libclang-dev; elsewhere set LIBCLANG_PATH)."
            )
        })
        .write_to_file(out.join("bindings.rs"))
        .expect("OUT_DIR is writable");

    cc::Build::new()
        .file("shim.c")
        .include(&include)
        .std("c11")
        .compile("ggml_bindings_shim");
}
