//! Products as either phase of the forward pass has them.

use fewbit::kernels::{Activation, Batch, Kernels, Phase, STREAMS, Storage, TILE_ROWS};
use fewbit::tensor::Rows;
use fewbit::threads::Pool;

/// `out[t][r] = rows[r] · x[t]` for up to [`TILE_ROWS`] rows; what lies beyond the last is no number.
/// Of generation these are the first of four like runs.
pub fn products(
    kernels: &Kernels,
    phase: Phase,
    rows: Rows<'_>,
    x: &[Activation<'_>],
) -> Vec<[f32; TILE_ROWS]> {
    match phase {
        Phase::Prompt => {
            let mut out = vec![[f32::NAN; TILE_ROWS]; x.len()];
            let pool = Pool::new(1).expect("one thread");
            let (group, mut storage) = (std::iter::once(0..x.len()), Storage::default());
            let batch = Batch::new(&pool, kernels, phase, x.to_vec(), group, &mut storage);
            for some in batch.chunks(0..x.len()) {
                let out = &mut out[some.first..][..some.x.len()];
                kernels.product(rows, some, out);
            }
            out
        }
        Phase::Generate => {
            let mut out = vec![[[f32::NAN; TILE_ROWS]; STREAMS]; x.len()];
            kernels.dots(&[rows; STREAMS], x, &mut out);
            out.iter().map(|runs| runs[0]).collect()
        }
    }
}
