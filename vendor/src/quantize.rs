//! llama.cpp's quantizer of whole files, as llama-quantize calls it.

use std::ffi::CString;
use std::path::Path;
use std::ptr;

use crate::sys;

/// What a file is to be quantized with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantize<'a> {
    /// The mix (`llama_ftype`).
    pub file_type: u32,
    /// Importance weights by tensor name: as many as columns, for each expert.
    pub imatrix: &'a [(String, Vec<f32>)],
    /// Regular expressions on names and the types (ggml ids) that they force.
    pub overrides: &'a [(&'a str, u32)],
}

impl Quantize<'_> {
    /// Quantizes the GGUF file `input` into `output` (`llama_model_quantize`).
    ///
    /// # Errors
    /// If llama.cpp refuses; it has then said why on stderr.
    ///
    /// # Panics
    /// If a path or a name holds a zero byte or a path is not UTF-8.
    pub fn run(&self, input: &Path, output: &Path) -> Result<(), u32> {
        let c_string = |text: &str| CString::new(text).expect("no zero byte");
        let c_path = |path: &Path| c_string(path.to_str().expect("a path in UTF-8"));

        let names: Vec<CString> = self
            .imatrix
            .iter()
            .map(|(name, _)| c_string(name))
            .collect();
        let mut imatrix: Vec<sys::llama_model_imatrix_data> = names
            .iter()
            .zip(self.imatrix)
            .map(|(name, (_, weights))| sys::llama_model_imatrix_data {
                name: name.as_ptr(),
                data: weights.as_ptr(),
                size: weights.len(),
            })
            .collect();
        imatrix.push(sys::llama_model_imatrix_data {
            name: ptr::null(),
            data: ptr::null(),
            size: 0,
        });

        let patterns: Vec<CString> = self
            .overrides
            .iter()
            .map(|(pattern, _)| c_string(pattern))
            .collect();
        let mut overrides: Vec<sys::llama_model_tensor_override> = patterns
            .iter()
            .zip(self.overrides)
            .map(|(pattern, &(_, kind))| sys::llama_model_tensor_override {
                pattern: pattern.as_ptr(),
                type_: kind,
            })
            .collect();
        overrides.push(sys::llama_model_tensor_override {
            pattern: ptr::null(),
            type_: sys::GGML_TYPE_COUNT,
        });

        // SAFETY: takes nothing and returns a plain struct.
        let mut params = unsafe { sys::llama_model_quantize_default_params() };
        params.ftype = self.file_type;
        if !self.imatrix.is_empty() {
            params.imatrix = imatrix.as_ptr();
        }
        if !self.overrides.is_empty() {
            params.tt_overrides = overrides.as_ptr();
        }
        let (input, output) = (c_path(input), c_path(output));
        // SAFETY: the strings end in zeros and the lists in their null entries; all of them outlive the call.
        match unsafe { sys::llama_model_quantize(input.as_ptr(), output.as_ptr(), &params) } {
            0 => Ok(()),
            code => Err(code),
        }
    }
}
