//! Bindings to ggml and llama.cpp: the oracle of fewbit's conformance tests and the rival in its
//! benches. Never used to run a model for anybody else.
//!
//! The sources come with the package llama-cpp-sys-2, which compiles them (cmake, libclang and
//! a C++ compiler are needed; `check-tools.sh` says what is missing). [`sys`] holds the raw
//! bindings, generated from their headers and from `wrapper.h`; the functions here put a safe
//! face on what the block tests need, and [`llama`] on what it takes to run a model.
//!
//! The oracle's bits depend on how it was compiled: see [`contracts_multiply_add`].

pub mod llama;
mod quantize;

pub use quantize::Quantize;

// Links the static libraries that its build script made.
use llama_cpp_sys_2 as _;

/// The raw bindings: ggml.h, ggml-cpu.h, gguf.h, llama.h, and the row functions of
/// ggml-quants.c.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all
)]
pub mod sys {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

/// What ggml knows of a type, checked to be one that has rows.
fn traits(kind: u32) -> &'static sys::ggml_type_traits {
    assert!(kind < sys::GGML_TYPE_COUNT, "ggml has no type {kind}");
    // SAFETY: the id is in range, and the table that this points into is constant.
    let traits = unsafe { &*sys::ggml_get_type_traits(kind) };
    assert!(traits.blck_size > 0, "ggml has removed type {kind}");
    traits
}

/// Bytes of a row of `cols` weights of the type with ggml's id `kind`.
///
/// # Panics
/// If there is no such type or its blocks do not fill the row.
pub fn row_bytes(kind: u32, cols: usize) -> usize {
    let traits = traits(kind);
    let block = traits.blck_size as usize;
    assert_eq!(cols % block, 0, "blocks of {block} do not fill {cols}");
    cols / block * traits.type_size
}

/// A row as llama-quantize stores it: `ggml_quantize_chunk`, with importance weights or without.
///
/// # Panics
/// If the lengths do not fit, or the type has no quantizer or none without importance.
pub fn quantize_row(kind: u32, row: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let traits = traits(kind);
    assert!(
        kind == sys::GGML_TYPE_F32 || traits.from_float_ref.is_some(),
        "ggml has no quantizer to type {kind}"
    );
    if let Some(importance) = importance {
        assert_eq!(importance.len(), row.len(), "one importance a column");
    }
    // SAFETY: reads a constant of the type.
    let required = unsafe { sys::ggml_quantize_requires_imatrix(kind) };
    assert!(
        !required || importance.is_some(),
        "type {kind} needs importance"
    );
    let mut bytes = vec![0; row_bytes(kind, row.len())];
    // SAFETY: one row of `row.len()` weights is read, as many importance weights where there
    // are any, and `row_bytes` bytes are written.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            kind,
            row.as_ptr(),
            bytes.as_mut_ptr().cast(),
            0,
            1,
            row.len() as i64,
            importance.map_or(std::ptr::null(), <[f32]>::as_ptr),
        )
    };
    assert_eq!(written, bytes.len());
    bytes
}

/// A row by the type's reference function (`quantize_row_*_ref`); `None` where there is none.
///
/// # Panics
/// If the lengths do not fit.
pub fn quantize_row_ref(kind: u32, row: &[f32]) -> Option<Vec<u8>> {
    let quantize = traits(kind).from_float_ref?;
    let mut bytes = vec![0; row_bytes(kind, row.len())];
    // SAFETY: reads `row.len()` weights, whole blocks of them, and writes `row_bytes` bytes.
    unsafe { quantize(row.as_ptr(), bytes.as_mut_ptr().cast(), row.len() as i64) };
    Some(bytes)
}

/// The weights of a row (`dequantize_row_*`); `None` where there is nothing to decode (F32).
///
/// # Panics
/// If the bytes are no whole number of blocks.
pub fn dequantize_row(kind: u32, bytes: &[u8]) -> Option<Vec<f32>> {
    let traits = traits(kind);
    let dequantize = traits.to_float?;
    let block = traits.type_size;
    assert_eq!(bytes.len() % block, 0, "not whole blocks of {block} bytes");
    let mut row = vec![0.0; bytes.len() / block * traits.blck_size as usize];
    // ggml reads 16-bit scales as such: the blocks must lie at an even address.
    let aligned: Vec<u16> = bytes
        .chunks(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
        .collect();
    // SAFETY: reads whole blocks, `bytes.len()` bytes of them, and writes their weights.
    unsafe { dequantize(aligned.as_ptr().cast(), row.as_mut_ptr(), row.len() as i64) };
    Some(row)
}

/// Whether ggml's row functions were compiled to fused multiply-adds, which changes what some
/// blocks encode to. (Decoding has no product that a float does not hold exactly.)
///
/// By default ggml is built for the architecture's baseline, on x86-64 without FMA. With
/// `RUSTFLAGS=-Ctarget-cpu=native` it is built for this machine, and the C compiler contracts
/// `a * b + c`. Rows are equal to ours only where this is false.
pub fn contracts_multiply_add() -> bool {
    // The level of a Q4_0 weight is ⌊x/d + 8.5⌋: here 1 if the quotient is rounded before the
    // addition, and 0 if it is not.
    let row = (0..1000)
        .find_map(|i| {
            let largest = -8.0 - i as f32 / 1024.0;
            let d = largest / -8.0;
            let inverse = 1.0 / d;
            let x = -7.5 * d;
            let differs = x * inverse + 8.5 == 1.0 && x.mul_add(inverse, 8.5) < 1.0;
            differs.then(|| std::array::from_fn::<_, 32, _>(|j| if j == 0 { largest } else { x }))
        })
        .expect("one of a thousand quotients is rounded up");
    let block = quantize_row(sys::GGML_TYPE_Q4_0, &row, None);
    let last_level = block[17] >> 4;
    last_level == 0
}

/// The CPU features that ggml was compiled for (`llama_print_system_info`).
pub fn system_info() -> String {
    static CALLING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = CALLING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    // SAFETY: a C string that lives until the next call, which waits for the lock.
    let info = unsafe { std::ffi::CStr::from_ptr(sys::llama_print_system_info()) };
    info.to_string_lossy().trim_end_matches([' ', '|']).into()
}

/// From now on llama.cpp and ggml print errors only.
pub fn log_errors_only() {
    // SAFETY: installs a callback that lives as long as the program.
    unsafe { sys::ggml_bindings_log_errors_only() }
}
