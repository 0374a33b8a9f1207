//! Sums over the rows that a site's matrices are given.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, s};

use crate::kernels::Activations;
use crate::kernels::experts::Routes;
use crate::threads::Pool;

/// Columns that a task takes at most.
const STRIP: usize = 64;

/// Statistics of matrices with the same input.
pub(super) struct Sums {
    columns: usize,
    /// Rows that each expert saw.
    pub counts: Vec<u64>,
    /// `[experts, columns]`: Σ x².
    pub squares: Vec<f64>,
    /// Columns of a window of moments.
    width: usize,
    /// `[experts, columns, width]`: Σ p² · x[c] · x[k]; empty where nobody asked for it. Of each window the
    /// lower triangle is kept up, in strips, until [`mirror`](Self::mirror).
    pub moments: Vec<f32>,
    /// An expert's rows after another's, `p · x`.
    gathered: Vec<f32>,
}

impl Sums {
    pub fn new(columns: usize, experts: usize, width: Option<usize>) -> Self {
        Self {
            columns,
            counts: vec![0; experts],
            squares: vec![0.0; experts * columns],
            width: width.unwrap_or(columns),
            moments: vec![0.0; width.map_or(0, |width| experts * columns * width)],
            gathered: Vec::new(),
        }
    }

    /// Columns of a strip: it lies inside a window and inside an expert.
    fn strip(&self) -> usize {
        let gcd = |mut a: usize, mut b: usize| {
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        gcd(gcd(STRIP, self.columns), self.width)
    }

    /// Adds a batch. With `routes`, the rows are those of tokens, or one a route (those of the down matrices);
    /// without, all are one expert's.
    pub fn add(&mut self, pool: &Pool, rows: &Activations, routes: Option<&Routes>) {
        let (columns, experts) = (self.columns, self.counts.len());
        // The experts' rows: where each begins, and which row of the batch it is, times what.
        let mut starts = vec![0];
        let mut picked: Vec<(usize, f32)> = Vec::new();
        match routes {
            None => picked.extend((0..rows.len()).map(|row| (row, 1.0))),
            Some(routes) => {
                let by_route = rows.len() == routes.len();
                for expert in 0..experts {
                    starts.push(routes.of(expert).end);
                    picked.extend(routes.of(expert).map(|route| {
                        let (token, weight) = routes.route(route);
                        (if by_route { route } else { token }, weight)
                    }));
                }
            }
        }
        if routes.is_none() {
            starts.push(rows.len());
        }
        for (count, ends) in self.counts.iter_mut().zip(starts.windows(2)) {
            *count += (ends[1] - ends[0]) as u64;
        }

        let strip = self.strip();
        let of_expert = |expert: usize| &picked[starts[expert]..starts[expert + 1]];
        pool.chunks(&mut self.squares, strip, |index, squares| {
            let (expert, column) = (index * strip / columns, index * strip % columns);
            for &(row, _) in of_expert(expert) {
                let x = &rows.row(row).x[column..column + strip];
                for (sum, &x) in squares.iter_mut().zip(x) {
                    *sum += f64::from(x) * f64::from(x);
                }
            }
        });

        if self.moments.is_empty() {
            return;
        }
        self.gathered.resize(picked.len() * columns, 0.0);
        pool.chunks(&mut self.gathered, columns, |index, gathered| {
            let (row, weight) = picked[index];
            for (gathered, x) in gathered.iter_mut().zip(rows.row(row).x) {
                *gathered = weight * x;
            }
        });
        let (gathered, width) = (&self.gathered, self.width);
        let all =
            ArrayView2::from_shape((picked.len(), columns), gathered).expect("rows are whole");
        pool.chunks(&mut self.moments, strip * width, |index, moments| {
            let (expert, column) = (index * strip / columns, index * strip % columns);
            let window = column / width * width;
            let below = column + strip - window;
            let x = all.slice(s![starts[expert]..starts[expert + 1], ..]);
            let moments = ArrayViewMut2::from_shape((strip, width), moments).expect("a strip");
            general_mat_mul(
                1.0,
                &x.slice(s![.., column..column + strip]).t(),
                &x.slice(s![.., window..window + below]),
                1.0,
                &mut moments.slice_move(s![.., ..below]),
            );
        });
    }

    /// Fills the upper triangles of the windows from the lower.
    pub fn mirror(&mut self) {
        let (columns, width) = (self.columns, self.width);
        if self.moments.is_empty() {
            return;
        }
        for expert in self.moments.chunks_exact_mut(columns * width) {
            for window in expert.chunks_mut(width * width) {
                for row in 0..window.len() / width {
                    for column in 0..row {
                        window[column * width + row] = window[row * width + column];
                    }
                }
            }
        }
    }
}
