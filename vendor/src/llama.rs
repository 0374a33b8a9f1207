//! A model run by llama.cpp, on the CPU.
//!
//! [`Settings::exact`] are those under which its logits can be compared with fewbit's: attention
//! without the flash kernel (which accumulates values in f16), weights mapped and multiplied as
//! they lie in the file (not repacked), the whole prompt in one batch. A race takes
//! [`Settings::fast`]. Keys and values are in f16.

use std::ffi::CString;
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Once;

use crate::sys;

/// How llama.cpp runs a model.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Tokens that a context has room for.
    pub context: usize,
    /// Tokens of a prompt that go through the model in one pass (`n_ubatch`).
    pub batch: usize,
    /// Threads.
    pub threads: usize,
    /// The fused attention kernel.
    pub flash_attention: bool,
}

impl Settings {
    /// Those of the comparison of logits.
    pub fn exact(context: usize, threads: usize) -> Self {
        Self {
            context,
            batch: context,
            threads,
            flash_attention: false,
        }
    }

    /// Those that are fastest on a CPU, llama-bench's: 512 tokens a pass and flash attention.
    pub fn fast(context: usize, threads: usize) -> Self {
        Self {
            context,
            batch: context.min(512),
            threads,
            flash_attention: true,
        }
    }
}

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

    /// As [`Self::load`], with rows copied into the layouts that llama.cpp prefers where it has one
    /// (it does so by default).
    pub fn load_repacked(path: &Path) -> Option<Self> {
        Self::load_with(path, |params| params.use_extra_bufts = true)
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

    /// An empty context; `None` if llama.cpp cannot make one (no memory, or the model was loaded
    /// without weights). It says why on standard error.
    ///
    /// # Panics
    /// If the system starts no threads.
    pub fn context(&self, settings: Settings) -> Option<Context<'_>> {
        let size = |tokens| u32::try_from(tokens).expect("a context below 4 Gi tokens");
        let threads = i32::try_from(settings.threads).expect("a sane number of threads");
        // SAFETY: the model is alive; the parameters are llama.cpp's own with plain fields changed.
        let context = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = size(settings.context);
            params.n_batch = size(settings.context);
            params.n_ubatch = size(settings.batch);
            params.n_threads = threads;
            params.n_threads_batch = threads;
            params.flash_attn_type = if settings.flash_attention {
                sys::LLAMA_FLASH_ATTN_TYPE_ENABLED
            } else {
                sys::LLAMA_FLASH_ATTN_TYPE_DISABLED
            };
            params.type_k = sys::GGML_TYPE_F16;
            params.type_v = sys::GGML_TYPE_F16;
            sys::llama_init_from_model(self.0.as_ptr(), params)
        };
        let context = NonNull::new(context)?;
        let pool = ThreadPool::new(threads);
        // SAFETY: both are alive; the context is freed first.
        unsafe {
            sys::llama_attach_threadpool(context.as_ptr(), pool.0.as_ptr(), std::ptr::null_mut());
        }
        Some(Context {
            context,
            pool,
            vocab: self.vocab_len(),
            capacity: settings.context,
            len: 0,
            _model: PhantomData,
        })
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: its contexts borrow it, so none is left.
        unsafe { sys::llama_model_free(self.0.as_ptr()) }
    }
}

/// ggml's threads. They spin while they wait, unless paused.
struct ThreadPool(NonNull<sys::ggml_threadpool>);

impl ThreadPool {
    fn new(threads: i32) -> Self {
        // SAFETY: the parameters are ggml's own and outlive the call.
        let pool = unsafe {
            let mut params = sys::ggml_threadpool_params_default(threads);
            params.paused = true;
            sys::ggml_threadpool_new(&mut params)
        };
        Self(NonNull::new(pool).expect("ggml starts threads"))
    }

    fn pause(&self) {
        // SAFETY: the pool is alive, and no graph is being computed: whoever computes holds the
        // context exclusively.
        unsafe { sys::ggml_threadpool_pause(self.0.as_ptr()) }
    }

    fn resume(&self) {
        // SAFETY: as above.
        unsafe { sys::ggml_threadpool_resume(self.0.as_ptr()) }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // SAFETY: its context has been freed, which waits for what runs.
        unsafe { sys::ggml_threadpool_free(self.0.as_ptr()) }
    }
}

/// One timeline of a [`Model`].
pub struct Context<'a> {
    context: NonNull<sys::llama_context>,
    /// Dropped after the context: see `Drop`.
    pool: ThreadPool,
    vocab: usize,
    capacity: usize,
    /// Tokens so far.
    len: usize,
    _model: PhantomData<&'a Model>,
}

impl Context<'_> {
    /// Runs `tokens` from an empty context and returns the logits after each of
    /// `tokens[from..]`, `[tokens.len() - from, vocab]`.
    ///
    /// # Panics
    /// If `tokens` is empty, does not fit, or holds an id outside the vocabulary.
    pub fn logits(&mut self, tokens: &[u32], from: usize) -> Vec<f32> {
        self.clear();
        self.wake();
        let status = self.append(tokens, from);
        self.rest();
        assert_eq!(status, 0, "llama.cpp runs the batch");
        (from..tokens.len())
            .flat_map(|i| {
                // SAFETY: logits of token `i` were asked for: a row of `vocab` floats that lives
                // until the next batch.
                unsafe {
                    let row = sys::llama_get_logits_ith(self.context.as_ptr(), i as i32);
                    assert!(!row.is_null());
                    std::slice::from_raw_parts(row, self.vocab)
                }
            })
            .copied()
            .collect()
    }

    /// Appends `tokens` and computes the logits after the last one; returns when they are there.
    ///
    /// # Errors
    /// The status that llama.cpp fails with.
    ///
    /// # Panics
    /// As [`Self::logits`].
    pub fn feed(&mut self, tokens: &[u32]) -> Result<(), i32> {
        match self.append(tokens, tokens.len().saturating_sub(1)) {
            0 => Ok(()),
            status => Err(status),
        }
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.len = 0;
        // SAFETY: the context is alive, and so is its memory.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context.as_ptr()), true) }
    }

    /// Lets the threads spin for work, as they do while a prompt is answered.
    pub fn wake(&mut self) {
        self.pool.resume();
    }

    /// Puts the threads to sleep, so that they take no time from others.
    pub fn rest(&mut self) {
        self.pool.pause();
    }

    /// `llama_decode`'s status, 0 if all went well.
    fn append(&mut self, tokens: &[u32], from: usize) -> i32 {
        assert!(!tokens.is_empty() && tokens.len() <= self.capacity - self.len);
        assert!(tokens.iter().all(|&token| (token as usize) < self.vocab));
        let end = self.len + tokens.len();
        let mut token: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let mut pos: Vec<i32> = (self.len as i32..end as i32).collect();
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
        // SAFETY: every array of the batch has `n_tokens` entries and outlives the call.
        let status = unsafe {
            let status = sys::llama_decode(self.context.as_ptr(), batch);
            sys::llama_synchronize(self.context.as_ptr());
            status
        };
        self.len = end;
        status
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `Model::context`, and freed once, before the model and the threads.
        unsafe {
            sys::llama_detach_threadpool(self.context.as_ptr());
            sys::llama_free(self.context.as_ptr());
        }
    }
}
