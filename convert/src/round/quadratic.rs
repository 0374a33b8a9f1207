//! The quadratic form that a row's rounding errors are measured by, and its factors.
//!
//! Second moments are known within windows of columns; a window's matrix `H` is damped, scaled
//! and factored as `H = R Rᵀ` with `R` upper triangular, its columns in an order of our choice. With
//! errors `e` in that order, `eᵀ H e = Σ_q R_qq² (e_q + Σ_{p<q} L_pq e_p)²` where `L_pq = R_pq / R_qq`: so
//! column `q`, coming after the columns `p`, is best rounded near `w_q + Σ L_pq e_p`.
//!
//! Blocks are encoded region by region of 256 columns. What a region's errors cost, given that later
//! regions will take up what they can, is `R_bb R_bbᵀ`, the Schur complement of those later columns.

use multiversion::multiversion;
use rayon::prelude::*;

/// Columns that are encoded together.
pub const REGION: usize = 256;

/// What is added to the diagonal, as a share of its mean: moments of few tokens are no full rank, and those of another text differ.
const DAMPING: f64 = 0.01;

/// The quadratic form of a row.
pub struct Quadratic {
    pub windows: Vec<Window>,
}

/// Columns whose inputs are known to go together.
pub struct Window {
    /// The first column, in the row.
    pub start: usize,
    /// Columns, from `start` on, in the order in which they are rounded; empty for those of a diagonal form.
    pub order: Vec<usize>,
    /// `L`, `[len, len]` in that order, row by row; empty for a diagonal form.
    pub feedback: Vec<f32>,
    /// Its regions, in order.
    pub regions: Vec<Region>,
}

/// Columns that are encoded together.
pub struct Region {
    /// The first column, in the window.
    pub start: usize,
    /// What their errors cost.
    pub cost: Cost,
}

/// A quadratic form over a region's columns in their natural order.
pub enum Cost {
    /// Of independent columns.
    Diagonal(Vec<f32>),
    /// `[len, len]`, symmetric.
    Full(Vec<f32>),
}

/// Moments of a window as they were counted.
pub struct RawWindow {
    /// The first column, in the row.
    pub start: usize,
    /// `[len, len]`.
    pub moments: Vec<f32>,
    /// Columns.
    pub len: usize,
}

impl Quadratic {
    pub fn new(windows: Vec<Window>) -> Self {
        Self { windows }
    }

    /// Of independent columns.
    pub fn diagonal(importance: &[f32]) -> Self {
        let mean = importance.iter().sum::<f32>() / importance.len() as f32;
        let scale = if mean > 0.0 { 1.0 / mean } else { 1.0 };
        let region = |(index, importance): (usize, &[f32])| Window {
            start: index * REGION,
            order: Vec::new(),
            feedback: Vec::new(),
            regions: vec![Region {
                start: 0,
                cost: Cost::Diagonal(importance.iter().map(|i| i * scale).collect()),
            }],
        };
        Self {
            windows: importance.chunks(REGION).enumerate().map(region).collect(),
        }
    }
}

impl RawWindow {
    /// `eᵀ H e`, of a row's errors those within the window.
    pub fn cost(&self, errors: &[f32]) -> f64 {
        let errors = &errors[self.start..self.start + self.len];
        let rows = self.moments.chunks_exact(self.len).zip(errors);
        rows.map(|(row, &error)| {
            let terms = row.iter().zip(errors);
            f64::from(error) * terms.map(|(m, e)| f64::from(m * e)).sum::<f64>()
        })
        .sum()
    }

    /// Damps and factors; blocks have sub-blocks of `sub` columns.
    pub fn prepare(&self, sub: usize) -> Window {
        let n = self.len;
        let diagonal = |i: usize| f64::from(self.moments[i * n + i]);
        let mean = (0..n).map(diagonal).sum::<f64>() / n as f64;
        let scale = if mean > 0.0 { 1.0 / mean } else { 0.0 };

        // Loud columns first, while there are others to take up their errors; a sub-block's together.
        let mut order = Vec::with_capacity(n);
        for start in (0..n).step_by(REGION) {
            let mut subs: Vec<Vec<usize>> = (start..n.min(start + REGION))
                .collect::<Vec<_>>()
                .chunks(sub)
                .map(|columns| {
                    let mut columns = columns.to_vec();
                    columns.sort_by(|&a, &b| diagonal(b).total_cmp(&diagonal(a)).then(a.cmp(&b)));
                    columns
                })
                .collect();
            let total = |columns: &[usize]| columns.iter().map(|&c| diagonal(c)).sum::<f64>();
            subs.sort_by(|a, b| total(b).total_cmp(&total(a)).then(a.cmp(b)));
            order.extend(subs.into_iter().flatten());
        }

        // More damping where rounding has left no positive definite matrix.
        let mut damping = DAMPING;
        let factor = loop {
            if let Some(factor) = self.factor(&order, scale, damping) {
                break factor;
            }
            damping *= 10.0;
        };
        let r = |p: usize, q: usize| factor[p * n + q];
        let mut feedback = vec![0.0; n * n];
        for p in 0..n {
            for q in p + 1..n {
                feedback[p * n + q] = (r(p, q) / r(q, q)) as f32;
            }
        }
        let regions = (0..n).step_by(REGION).map(|start| {
            let end = n.min(start + REGION);
            let len = end - start;
            let mut cost = vec![0.0; len * len];
            for i in start..end {
                for j in i..end {
                    // R_bb is upper triangular.
                    let (a, b) = (
                        &factor[i * n + j..i * n + end],
                        &factor[j * n + j..j * n + end],
                    );
                    let sum = dot(a, b) as f32;
                    let (row, column) = (order[i] - start, order[j] - start);
                    cost[row * len + column] = sum;
                    cost[column * len + row] = sum;
                }
            }
            Region {
                start,
                cost: Cost::Full(cost),
            }
        });
        Window {
            start: self.start,
            regions: regions.collect(),
            order,
            feedback,
        }
    }

    /// `R`, in `order`; `None` where the damped matrix is not positive definite.
    fn factor(&self, order: &[usize], scale: f64, damping: f64) -> Option<Vec<f64>> {
        let n = self.len;
        // From the last column to the first, the Cholesky factor of the reversed matrix: row `i` of `l` is
        // lower triangular, and its products run along rows.
        let mut l = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let (row, column) = (order[n - 1 - i], order[n - 1 - j]);
                l[i * n + j] = f64::from(self.moments[row * n + column]) * scale;
            }
            l[i * n + i] += damping;
        }
        for start in (0..n).step_by(BAND) {
            let (done, rest) = l.split_at_mut(start * n);
            let band = &mut rest[..n.min(BAND).min(n - start) * n];
            // What the rows before have to do with it, several rows at once; then its own triangle.
            band.par_chunks_mut(TOGETHER * n)
                .for_each(|rows| eliminate(rows, done, n));
            for i in 0..band.len() / n {
                let (above, row) = band.split_at_mut(i * n);
                for j in 0..i {
                    let other = &above[j * n..][..start + j + 1];
                    let sum = row[start + j] - dot(&row[..start + j], &other[..start + j]);
                    row[start + j] = sum / other[start + j];
                }
                let (before, own) = row.split_at_mut(start + i);
                let sum = own[0] - dot(before, before);
                if sum.is_nan() || sum <= damping * 1e-6 {
                    return None;
                }
                own[0] = sum.sqrt();
            }
        }
        let mut r = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                r[(n - 1 - i) * n + n - 1 - j] = l[i * n + j];
            }
        }
        Some(r)
    }
}

/// Rows that are factored in a band, and of these the ones that go over the rows before together.
const BAND: usize = 64;
const TOGETHER: usize = 8;

/// The columns of `rows` (each `n` long) that the rows of `done` own: of each what is left of it after those before it.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx+avx2",
    "x86_64+avx+avx2"
))]
fn eliminate(rows: &mut [f64], done: &[f64], n: usize) {
    for (j, other) in done.chunks_exact(n).enumerate() {
        for row in rows.chunks_exact_mut(n) {
            row[j] = (row[j] - dot(&row[..j], &other[..j])) / other[j];
        }
    }
}

/// Σ a·b, in lanes whose order is fixed.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}
