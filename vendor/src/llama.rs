//! A model run by llama.cpp, on the CPU.
//!
//! The settings are those under which its logits can be compared with fewbit's: keys and values
//! in f16, attention without the flash kernel (which accumulates values in f16), weights mapped
//! and multiplied as they lie in the file (not repacked), the whole prompt in one batch.

use std::ffi::CString;
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Once;

use crate::sys;

/// A model loaded by llama.cpp.
pub struct Model(NonNull<sys::llama_model>);

// SAFETY: a loaded model is only read; llama.cpp shares one between the contexts of any threads.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Maps the file at `path`; `None` if llama.cpp refuses it (it says why on standard error).
    pub fn load(path: &Path) -> Option<Self> {
        Self::load_with(path, |_| {})
    }

    /// The vocabulary alone.
    pub fn load_vocab(path: &Path) -> Option<Self> {
        Self::load_with(path, |params| params.vocab_only = true)
    }

    fn load_with(path: &Path, adjust: impl Fn(&mut sys::llama_model_params)) -> Option<Self> {
        static INIT: Once = Once::new();
        INIT.call_once(|| {
            crate::log_errors_only();
            // SAFETY: called once, before anything else of llama.cpp's.
            unsafe { sys::llama_backend_init() }
        });
        let path = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
        // SAFETY: the parameters are llama.cpp's own with plain fields changed; the path is a C
        // string that outlives the call.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            params.load_mode = sys::LLAMA_LOAD_MODE_MMAP;
            params.use_extra_bufts = false;
            adjust(&mut params);
            sys::llama_model_load_from_file(path.as_ptr(), params)
        };
        NonNull::new(model).map(Self)
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is alive; the vocabulary is a part of it.
        unsafe { sys::llama_model_get_vocab(self.0.as_ptr()) }
    }

    /// Size of the vocabulary.
    pub fn vocab_len(&self) -> usize {
        // SAFETY: the vocabulary lives as long as the model.
        let len = unsafe { sys::llama_vocab_n_tokens(self.vocab()) };
        usize::try_from(len).expect("a vocabulary has a size")
    }

    /// Tokens of `text`: with BOS or EOS where the vocabulary adds them (`add_special`), names of
    /// control tokens read as these or as plain text (`parse_special`).
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let bytes = i32::try_from(text.len()).expect("a text below 2 GiB");
        let fill = |tokens: &mut [i32]| {
            // SAFETY: reads `bytes` bytes of text and writes at most `tokens.len()` ids.
            unsafe {
                sys::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    bytes,
                    tokens.as_mut_ptr(),
                    tokens.len() as i32,
                    add_special,
                    parse_special,
                )
            }
        };
        // Without room, the answer is the number of tokens, negated.
        let mut tokens = vec![0; fill(&mut []).unsigned_abs() as usize];
        let written = fill(&mut tokens);
        assert_eq!(usize::try_from(written), Ok(tokens.len()));
        tokens.into_iter().map(|token| token as u32).collect()
    }

    /// An empty context with room for `len` tokens, run by `threads` threads.
    ///
    /// # Panics
    /// If llama.cpp cannot make one (the model was loaded without weights, say).
    pub fn context(&self, len: usize, threads: usize) -> Context<'_> {
        let len = u32::try_from(len).expect("a context below 4 Gi tokens");
        let threads = i32::try_from(threads).expect("a sane number of threads");
        // SAFETY: the model is alive; the parameters are llama.cpp's own with plain fields changed.
        let context = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = len;
            params.n_batch = len;
            params.n_ubatch = len;
            params.n_threads = threads;
            params.n_threads_batch = threads;
            params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
            params.type_k = sys::GGML_TYPE_F16;
            params.type_v = sys::GGML_TYPE_F16;
            sys::llama_init_from_model(self.0.as_ptr(), params)
        };
        Context {
            context: NonNull::new(context).expect("llama.cpp makes a context"),
            vocab: self.vocab_len(),
            capacity: len as usize,
            _model: PhantomData,
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: its contexts borrow it, so none is left.
        unsafe { sys::llama_model_free(self.0.as_ptr()) }
    }
}

/// One timeline of a [`Model`].
pub struct Context<'a> {
    context: NonNull<sys::llama_context>,
    vocab: usize,
    capacity: usize,
    _model: PhantomData<&'a Model>,
}

impl Context<'_> {
    /// Runs `tokens` from an empty context and returns the logits after each of
    /// `tokens[from..]`, `[tokens.len() - from, vocab]`.
    ///
    /// # Panics
    /// If `tokens` is empty, does not fit, or holds an id outside the vocabulary.
    pub fn logits(&mut self, tokens: &[u32], from: usize) -> Vec<f32> {
        assert!(!tokens.is_empty() && tokens.len() <= self.capacity);
        assert!(tokens.iter().all(|&token| (token as usize) < self.vocab));
        let mut token: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let mut pos: Vec<i32> = (0..token.len() as i32).collect();
        let mut sequence = 0;
        let mut sequences = vec![&raw mut sequence; token.len()];
        let mut sequence_counts = vec![1; token.len()];
        let mut wanted: Vec<i8> = (0..token.len()).map(|i| i8::from(i >= from)).collect();
        let batch = sys::llama_batch {
            n_tokens: token.len() as i32,
            token: token.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: pos.as_mut_ptr(),
            n_seq_id: sequence_counts.as_mut_ptr(),
            seq_id: sequences.as_mut_ptr(),
            logits: wanted.as_mut_ptr(),
        };
        let context = self.context.as_ptr();
        // SAFETY: every array of the batch has `n_tokens` entries and outlives the call.
        let status = unsafe {
            sys::llama_memory_clear(sys::llama_get_memory(context), true);
            sys::llama_decode(context, batch)
        };
        assert_eq!(status, 0, "llama.cpp runs the batch");
        (from..tokens.len())
            .flat_map(|i| {
                // SAFETY: logits of token `i` were asked for: a row of `vocab` floats that lives
                // until the next batch.
                unsafe {
                    let row = sys::llama_get_logits_ith(context, i as i32);
                    assert!(!row.is_null());
                    std::slice::from_raw_parts(row, self.vocab)
                }
            })
            .copied()
            .collect()
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `Model::context`, and freed once, before the model.
        unsafe { sys::llama_free(self.context.as_ptr()) }
    }
}
