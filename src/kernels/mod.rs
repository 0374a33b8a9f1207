//! Dot products and matrix products; one file an instruction set.
//!
//! A kernel multiplies rows of blocks, as they lie in the file, with rows of activations.
//! Which instruction set is used is decided once, at start-up: [`Kernels::best`] takes the
//! widest that the CPU has, [`Kernels::named`] the one asked for, and both hand out a table of
//! functions that is the same for the rest of the process. The scalar table is the truth: it
//! exists everywhere, and tests hold every other against it.
//!
//! Quantized rows meet activations of 8 bits with one scale for each 32 ([`Activations`]), and a few
//! of them, the loud ones, in f32 ([`mod@loud`]);
//! F32, F16 and BF16 rows meet the activations in f32.
//!
//! There are two kinds of kernels, for the two phases of a model's work ([`Phase`]): dot products
//! of rows as they lie, and products of tiles of rows ([`tiles`]), unpacked once for all tokens
//! of a prompt.

pub mod activations;
pub mod attention;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod experts;
pub mod floats;
mod lanes;
pub mod limits;
pub mod linear;
pub mod loud;
pub mod low_rank;
#[cfg(target_arch = "aarch64")]
pub mod neon;
pub mod packed;
pub mod rates;
pub mod scalar;
pub mod tiles;
pub mod unpack;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activations::{Activation, Activations};
pub use floats::Floats;
pub use loud::{AddLoud, COLUMNS_A_LOUD, LOUD, Loud};
pub use packed::{Batch, Storage, Tokens};
pub use tiles::{TILE_ROWS, TILE_TOKENS, Tile};

use crate::quant::BlockType;
use crate::tensor::Rows;

/// Dots every row of `rows` with one activation row, but for its loud columns where it meets codes:
/// `out[r] = rows[r] · x`.
///
/// `out` is as long as there are rows; `x` has `rows.cols` columns.
pub type DotRows = fn(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]);

/// Runs of rows that are multiplied side by side, one row of each at a time: a core gets more out of
/// memory in four streams than in one.
pub const STREAMS: usize = 4;

/// The products of a token with [`STREAMS`] runs of up to [`TILE_ROWS`] rows.
pub type Sums = [[f32; TILE_ROWS]; STREAMS];

/// Dots the rows of four runs, which are as long as each other and of one type, with tokens:
/// `out[t][run][r] = rows[run][r] · x[t]`, each the bits of [`DotRows`]. Loud columns are left out.
pub type DotStreams = fn(rows: [Rows<'_>; STREAMS], x: &[Activation<'_>], out: &mut [Sums]);

/// Quantizes activations to codes, a scale for each 32, and a sum of codes for each 16.
pub type Quantize = fn(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]);

/// What a forward pass is for. It decides which kernels multiply: how many tokens meet at a
/// matrix or at an expert never does, so that a token's result does not depend on its company.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Many tokens that are known beforehand: tiles of rows, unpacked once for all of them.
    Prompt,
    /// A token, or a few, of each timeline: dot products with rows as they lie.
    Generate,
}

/// The functions of one instruction set.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// What `--kernels` calls it: `scalar`, `avx2`, `avxvnni`, `avx512`, `neon`, `neon-dotprod`,
    /// `neon-i8mm`.
    pub name: &'static str,
    /// The dot product for each type.
    pub dot: fn(BlockType) -> DotRows,
    /// The same of four runs of rows, where there is more to it than one run after the other.
    pub dot_streams: fn(BlockType) -> Option<DotStreams>,
    /// The product of a tile of rows with many tokens for each type: what [`Phase::Prompt`] takes.
    /// `None`: the dot product of each row and token.
    pub tile: fn(BlockType) -> Option<Tile>,
    /// Whether tiles read packed tokens: see [`packed`].
    pub packs: bool,
    /// The dot product in f32 throughout: rows are decoded and multiplied with `x.x`. For any type, and
    /// slow: see [`Kernels::exact`].
    pub exact: fn(BlockType) -> DotRows,
    /// The tile product in f32 throughout.
    pub exact_tile: fn(BlockType) -> Option<Tile>,
    /// Adds the products of loud columns to dot products; those of tiles have them already.
    pub add_loud: AddLoud,
    /// Quantizes activations: see [`activations::quantize`].
    pub quantize: Quantize,
    /// What works on floats between the products.
    pub floats: &'static Floats,
}

impl Kernels {
    /// All tables that this CPU can run, the widest last; the first is [`scalar::KERNELS`].
    pub fn available() -> Vec<&'static Kernels> {
        #[allow(unused_mut)] // some architectures have no table of their own
        let mut tables = vec![&scalar::KERNELS];
        #[cfg(target_arch = "x86_64")]
        tables.extend(
            [avx2::kernels(), avx2::vnni_kernels(), avx512::kernels()]
                .into_iter()
                .flatten(),
        );
        #[cfg(target_arch = "aarch64")]
        tables.extend(neon::kernels());
        tables
    }

    /// The widest that this CPU can run.
    pub fn best() -> &'static Kernels {
        Self::available()
            .pop()
            .expect("scalar kernels exist everywhere")
    }

    /// The table of that name, if this CPU can run it.
    pub fn named(name: &str) -> Option<&'static Kernels> {
        Self::available()
            .into_iter()
            .find(|kernels| kernels.name == name)
    }

    /// A table that multiplies with the activations in f32, for measuring what rounding them
    /// to 8 bits costs. All else is as in this one.
    pub fn exact(&self) -> Kernels {
        Kernels {
            dot: self.exact,
            dot_streams: |_| None,
            tile: self.exact_tile,
            packs: false,
            add_loud: |_, _, _| {},
            ..*self
        }
    }

    /// `out[r] = rows[r] · x`.
    pub fn dot_rows(&self, rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
        debug_assert_eq!((rows.cols, rows.len()), (x.x.len(), out.len()));
        (self.dot)(rows.kind)(rows, x, out);
        if !x.loud.is_empty() {
            (self.add_loud)(rows, x.loud, out);
        }
    }

    /// How many runs of rows of `kind` are best multiplied side by side: [`STREAMS`], or 1.
    pub fn streams(&self, phase: Phase, kind: BlockType) -> usize {
        match phase == Phase::Generate && (self.dot_streams)(kind).is_some() {
            true => STREAMS,
            false => 1,
        }
    }

    /// `out[t][run][r] = runs[run][r] · x[t]` for up to [`STREAMS`] runs of up to [`TILE_ROWS`] rows: what
    /// [`Phase::Generate`] takes. Each is the bits of [`dot_rows`](Self::dot_rows); what lies beyond
    /// the last row of a run is left undefined.
    pub fn dots(&self, runs: &[Rows<'_>], x: &[Activation<'_>], out: &mut [Sums]) {
        debug_assert_eq!(x.len(), out.len());
        if let &[a, b, c, d] = runs
            && [b, c, d]
                .iter()
                .all(|run| (run.kind, run.cols, run.len()) == (a.kind, a.cols, a.len()))
            && let Some(dot) = (self.dot_streams)(a.kind)
        {
            dot([a, b, c, d], x, out);
        } else {
            for (x, sums) in x.iter().zip(&mut *out) {
                for (&run, sums) in runs.iter().zip(sums) {
                    (self.dot)(run.kind)(run, *x, &mut sums[..run.len()]);
                }
            }
        }
        for (x, sums) in x.iter().zip(out).filter(|(x, _)| !x.loud.is_empty()) {
            for (&run, sums) in runs.iter().zip(sums) {
                (self.add_loud)(run, x.loud, &mut sums[..run.len()]);
            }
        }
    }

    /// `out[t][r] = rows[r] · x[t]` for up to [`TILE_ROWS`] rows: what [`Phase::Prompt`] takes. What lies
    /// beyond the last row is left undefined.
    pub fn product(&self, rows: Rows<'_>, x: Tokens<'_>, out: &mut [[f32; TILE_ROWS]]) {
        debug_assert_eq!(x.x.len(), out.len());
        match (self.tile)(rows.kind) {
            Some(tile) => tile(rows, x, out),
            None => {
                for (x, out) in x.x.iter().zip(out) {
                    self.dot_rows(rows, *x, &mut out[..rows.len()]);
                }
            }
        }
    }
}
