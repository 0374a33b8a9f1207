//! A row's blocks: first scales from ggml's encoder, levels by error feedback, then descent over everything.

use fewbit::quant::{BlockType, F16, Grid, Parts, Scales};
use multiversion::multiversion;

use super::quadratic::{Cost, Quadratic, REGION, Region, Window};

/// How often descent goes over levels, scales and units.
const ROUNDS: usize = 3;

/// Most sub-blocks of a region.
const SUBS: usize = REGION / 16;

/// Encodes a row of whole blocks.
pub fn encode_row(kind: BlockType, grid: &Grid, form: &Quadratic, row: &[f32], encoded: &mut [u8]) {
    for window in &form.windows {
        // What the errors so far suggest for each column, in the window's order.
        let mut carried = vec![0.0; window.order.len()];
        for region in &window.regions {
            let start = window.start + region.start;
            let columns = start..start + region.len();
            let bytes = start / kind.block_len() * kind.block_bytes();
            let bytes =
                &mut encoded[bytes..][..region.len() / kind.block_len() * kind.block_bytes()];
            let row = &row[columns];
            encode_region(kind, grid, window, region, row, &mut carried, bytes);
        }
    }
}

impl Region {
    fn len(&self) -> usize {
        match &self.cost {
            Cost::Diagonal(weights) => weights.len(),
            Cost::Full(matrix) => matrix.len().isqrt(),
        }
    }
}

impl Cost {
    #[inline(always)]
    fn diagonal(&self, i: usize, len: usize) -> f32 {
        match self {
            Cost::Diagonal(weights) => weights[i],
            Cost::Full(matrix) => matrix[i * len + i],
        }
    }

    /// `y += factor · column i`.
    #[inline(always)]
    fn add_column(&self, i: usize, factor: f32, y: &mut [f32]) {
        match self {
            Cost::Diagonal(weights) => y[i] += factor * weights[i],
            Cost::Full(matrix) => axpy(y, factor, &matrix[i * y.len()..][..y.len()]),
        }
    }

    /// `y = C · x` over the columns `from..from + x.len()`, all others of `x` being 0; of `y` only these columns are
    /// wanted where `y` is as long as `x`.
    #[inline(always)]
    fn multiply(&self, from: usize, x: &[f32], y: &mut [f32], len: usize) {
        match self {
            Cost::Diagonal(weights) => {
                let weights = &weights[from..];
                for ((y, x), w) in y.iter_mut().zip(x).zip(weights) {
                    *y = w * x;
                }
            }
            Cost::Full(matrix) => {
                for (row, y) in y.iter_mut().enumerate() {
                    *y = dot(&matrix[(from + row) * len + from..][..x.len()], x);
                }
            }
        }
    }
}

#[inline(always)]
fn axpy(y: &mut [f32], factor: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// Σ a·b, in lanes whose order is fixed.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..16 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// A region under way: `ŵ = scale·value[level] − min`, and how far it is from what is wanted.
struct State<'a> {
    grid: &'a Grid,
    cost: &'a Cost,
    len: usize,
    /// Weights of a block.
    block: usize,
    parts: Vec<Parts>,
    /// What would be best if there were no rounding.
    wanted: [f32; REGION],
    /// `value[level]`.
    values: [f32; REGION],
    levels: [u8; REGION],
    scales: [f32; SUBS],
    mins: [f32; SUBS],
    /// `C · (wanted − ŵ)`: half the slope of the cost, down.
    slope: [f32; REGION],
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx+avx2+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
fn encode_region(
    kind: BlockType,
    grid: &Grid,
    window: &Window,
    region: &Region,
    row: &[f32],
    carried: &mut [f32],
    encoded: &mut [u8],
) {
    let n = row.len();
    let full = !window.order.is_empty();
    let all = window.order.len();
    let places = region.start..region.start + n;
    // The weights, moved to where the errors of the regions before would be taken up best.
    let mut wanted = [0.0; REGION];
    wanted[..n].copy_from_slice(row);
    if region.start > 0 {
        let mut moved = [0.0; REGION];
        let moved = &mut moved[..n];
        moved.copy_from_slice(&carried[places.clone()]);
        for (p, place) in places.clone().enumerate() {
            let step = -moved[p];
            let later = &window.feedback[place * all + place + 1..place * all + places.end];
            axpy(&mut moved[p + 1..], step, later);
        }
        for (moved, place) in moved.iter().zip(places.clone()) {
            wanted[window.order[place] - region.start] += moved;
        }
    }

    let mut importance = [0.0; REGION];
    for (i, importance) in importance[..n].iter_mut().enumerate() {
        *importance = region.cost.diagonal(i, n);
    }
    let flat = importance[..n].iter().all(|x| *x == importance[0]);
    let encoder = kind
        .encoder()
        .expect("types that are taken apart are encoded too");
    encoder(&wanted[..n], (!flat).then_some(&importance[..n]), encoded);
    let mut state = State::new(kind, grid, region, wanted, encoded);
    if full {
        // Error feedback, from the weights themselves and all that is carried.
        let mut carried: Vec<f32> = carried[places.clone()].to_vec();
        for (p, place) in places.clone().enumerate() {
            let i = window.order[place] - region.start;
            let written = state.round(i, row[i] + carried[p]);
            let later = &window.feedback[place * all + place + 1..place * all + places.end];
            axpy(&mut carried[p + 1..], row[i] - written, later);
        }
    }
    state.set_slope();
    for _ in 0..ROUNDS {
        state.move_levels();
        state.move_scales();
        state.move_units();
    }
    while state.move_levels() {}
    state.write(kind, encoded);
    if places.end < all {
        for place in places.clone() {
            let i = window.order[place] - region.start;
            let error = row[i] - state.written(i);
            let later = &window.feedback[place * all + places.end..(place + 1) * all];
            axpy(&mut carried[places.end..], error, later);
        }
    }
}

impl<'a> State<'a> {
    #[inline(always)]
    fn new(
        kind: BlockType,
        grid: &'a Grid,
        region: &'a Region,
        wanted: [f32; REGION],
        encoded: &[u8],
    ) -> Self {
        let block = kind.block_len();
        let mut state = Self {
            grid,
            cost: &region.cost,
            len: region.len(),
            block,
            parts: encoded
                .chunks_exact(kind.block_bytes())
                .map(|bytes| Parts::of(kind, bytes))
                .collect(),
            wanted,
            values: [0.0; REGION],
            levels: [0; REGION],
            scales: [0.0; SUBS],
            mins: [0.0; SUBS],
            slope: [0.0; REGION],
        };
        for (index, parts) in state.parts.iter().enumerate() {
            state.levels[index * block..][..block].copy_from_slice(&parts.levels[..block]);
        }
        for i in 0..state.len {
            state.values[i] = grid.values[usize::from(state.levels[i])];
        }
        state.set_scales();
        state
    }

    /// Scales and minima from the parts.
    #[inline(always)]
    fn set_scales(&mut self) {
        let subs = self.block / self.grid.sub;
        for (index, parts) in self.parts.iter().enumerate() {
            let (d, dmin) = (parts.d.to_f32(), parts.dmin.to_f32());
            for sub in 0..subs {
                self.scales[index * subs + sub] = d * f32::from(parts.scales[sub]);
                self.mins[index * subs + sub] = dmin * f32::from(parts.mins[sub]);
            }
        }
    }

    #[inline(always)]
    fn written(&self, i: usize) -> f32 {
        let sub = i / self.grid.sub;
        self.scales[sub] * self.values[i] - self.mins[sub]
    }

    /// The level of weight `i` that comes nearest to `target`; returns what it stands for.
    #[inline(always)]
    fn round(&mut self, i: usize, target: f32) -> f32 {
        let sub = i / self.grid.sub;
        if self.scales[sub] != 0.0 {
            let level = self
                .grid
                .nearest((target + self.mins[sub]) / self.scales[sub]);
            self.levels[i] = level;
            self.values[i] = self.grid.values[usize::from(level)];
        }
        self.written(i)
    }

    #[inline(always)]
    fn set_slope(&mut self) {
        let mut errors = [0.0; REGION];
        for (i, error) in errors[..self.len].iter_mut().enumerate() {
            *error = self.wanted[i] - self.written(i);
        }
        let (errors, slope) = (&errors[..self.len], &mut self.slope[..self.len]);
        self.cost.multiply(0, errors, slope, self.len);
    }

    /// Each weight's level to where the cost is least, all others held. Whether any has moved.
    #[inline(always)]
    fn move_levels(&mut self) -> bool {
        let mut moved = false;
        for i in 0..self.len {
            let scale = self.scales[i / self.grid.sub];
            let cost = self.cost.diagonal(i, self.len);
            let best = self.values[i] + self.slope[i] / (cost * scale);
            let level = self.grid.nearest(best);
            if level == self.levels[i] || !best.is_finite() {
                continue;
            }
            let value = self.grid.values[usize::from(level)];
            let step = scale * (value - self.values[i]);
            // (e − step)ᵀ C (e − step) − eᵀ C e; a little more than rounding must be won.
            let change = step * step * cost - 2.0 * step * self.slope[i];
            if change < -1e-6 * step * step * cost {
                (self.levels[i], self.values[i]) = (level, value);
                let slope = &mut self.slope[..self.len];
                self.cost.add_column(i, -step, slope);
                moved = true;
            }
        }
        moved
    }

    /// Each sub-block's scale, and minimum, to where the cost is least, all others held.
    #[inline(always)]
    fn move_scales(&mut self) {
        let (size, subs) = (self.grid.sub, self.block / self.grid.sub);
        for sub in 0..self.len / size {
            let columns = sub * size..(sub + 1) * size;
            let line = self.line(columns.clone());
            let (scale, min) = (self.scales[sub], self.mins[sub]);
            let (x, y) = line.best(self.grid.mins);
            if !x.is_finite() || !y.is_finite() {
                continue;
            }
            let parts = &mut self.parts[sub / subs];
            let own = sub % subs;
            // The steps that can be written, and what they would change.
            let mut least = 0.0;
            let mut chosen = None;
            match self.grid.scales {
                Scales::Own => {
                    let d = F16::from_f32(scale + x);
                    let x = d.to_f32() - scale;
                    let dmin = match self.grid.mins {
                        true => F16::from_f32(min + line.best_min(x)),
                        false => parts.dmin,
                    };
                    let y = dmin.to_f32() - min;
                    let change = line.change(x, y);
                    if change < least && d.to_f32().is_finite() && dmin.to_f32().is_finite() {
                        (parts.d, parts.dmin) = (d, dmin);
                        chosen = Some((x, y));
                    }
                }
                Scales::Shared { low, high } => {
                    let (d, dmin) = (parts.d.to_f32(), parts.dmin.to_f32());
                    if d == 0.0 {
                        continue;
                    }
                    let near = ((scale + x) / d).floor();
                    let mut found = (parts.scales[own], parts.mins[own]);
                    for level in [near, near + 1.0] {
                        let level = level.clamp(f32::from(low), f32::from(high));
                        let x = d * level - scale;
                        let mut offer = |stored: u8, y: f32| {
                            let change = line.change(x, y);
                            if change < least {
                                least = change;
                                found = (level as i8, stored);
                                chosen = Some((x, y));
                            }
                        };
                        if !self.grid.mins || dmin == 0.0 {
                            offer(parts.mins[own], 0.0);
                            continue;
                        }
                        let near = ((min + line.best_min(x)) / dmin).floor();
                        for stored in [near, near + 1.0] {
                            let stored = stored.clamp(0.0, 63.0);
                            offer(stored as u8, dmin * stored - min);
                        }
                    }
                    (parts.scales[own], parts.mins[own]) = found;
                }
            }
            if let Some((x, y)) = chosen {
                (self.scales[sub], self.mins[sub]) = (scale + x, min + y);
                for i in columns {
                    let step = x * self.values[i] - y;
                    let slope = &mut self.slope[..self.len];
                    self.cost.add_column(i, -step, slope);
                }
            }
        }
    }

    /// What moving a sub-block's scale and minimum costs.
    #[inline(always)]
    fn line(&self, columns: std::ops::Range<usize>) -> Line {
        let (mut a, mut b) = ([0.0; 32], [0.0; 32]);
        let size = columns.len();
        let (a, b) = (&mut a[..size], &mut b[..size]);
        let values = &self.values[columns.clone()];
        let slope = &self.slope[columns.clone()];
        self.cost.multiply(columns.start, values, a, self.len);
        let ones = [1.0; 32];
        if self.grid.mins {
            self.cost
                .multiply(columns.start, &ones[..size], b, self.len);
        }
        Line {
            values: dot(values, a),
            both: dot(values, b),
            ones: dot(&ones[..size], b),
            slope: dot(values, slope),
            offset: dot(&ones[..size], slope),
        }
    }

    /// The units of the scales and minima to where the cost is least.
    #[inline(always)]
    fn move_units(&mut self) {
        if self.grid.scales == Scales::Own {
            return;
        }
        let size = self.grid.sub;
        let parts = self.parts[0];
        let (mut a, mut b) = ([0.0; REGION], [0.0; REGION]);
        for i in 0..self.len {
            a[i] = f32::from(parts.scales[i / size]) * self.values[i];
            b[i] = f32::from(parts.mins[i / size]);
        }
        let (a, b, n) = (&a[..self.len], &b[..self.len], self.len);
        let (mut ca, mut cb) = ([0.0; REGION], [0.0; REGION]);
        let (ca, cb) = (&mut ca[..n], &mut cb[..n]);
        self.cost.multiply(0, a, ca, n);
        if self.grid.mins {
            self.cost.multiply(0, b, cb, n);
        }
        let slope = &self.slope[..n];
        let line = Line {
            values: dot(a, ca),
            both: dot(a, cb),
            ones: dot(b, cb),
            slope: dot(a, slope),
            offset: dot(b, slope),
        };
        let (x, _) = line.best(self.grid.mins);
        let d = F16::from_f32(parts.d.to_f32() + x);
        let x = d.to_f32() - parts.d.to_f32();
        let mut dmin = parts.dmin;
        if self.grid.mins && line.ones > 0.0 {
            dmin = F16::from_f32(dmin.to_f32() + line.best_min(x));
        }
        let y = dmin.to_f32() - parts.dmin.to_f32();
        let sound = d.to_f32().is_finite() && dmin.to_f32().is_finite() && d.to_f32() != 0.0;
        if sound && dmin.to_f32() >= 0.0 && line.change(x, y) < 0.0 {
            (self.parts[0].d, self.parts[0].dmin) = (d, dmin);
            self.set_scales();
            self.set_slope();
        }
    }

    #[inline(always)]
    fn write(&mut self, kind: BlockType, encoded: &mut [u8]) {
        let blocks = encoded.chunks_exact_mut(kind.block_bytes());
        let levels = self.levels.chunks(self.block);
        for ((parts, levels), bytes) in self.parts.iter_mut().zip(levels).zip(blocks) {
            parts.levels[..self.block].copy_from_slice(levels);
            parts.write(kind, bytes);
        }
    }
}

/// The cost along two directions: `ŵ` moves by `x·values − y·ones`, and the cost changes by
/// `x²·values − 2xy·both + y²·ones − 2x·slope + 2y·offset`.
struct Line {
    values: f32,
    both: f32,
    ones: f32,
    slope: f32,
    offset: f32,
}

impl Line {
    #[inline(always)]
    fn change(&self, x: f32, y: f32) -> f32 {
        x * x * self.values - 2.0 * x * y * self.both + y * y * self.ones - 2.0 * x * self.slope
            + 2.0 * y * self.offset
    }

    /// The best `y` with `x`.
    #[inline(always)]
    fn best_min(&self, x: f32) -> f32 {
        (x * self.both - self.offset) / self.ones
    }

    /// The best of both; of `x` alone where there are no minima.
    #[inline(always)]
    fn best(&self, mins: bool) -> (f32, f32) {
        let determinant = self.values * self.ones - self.both * self.both;
        if !mins || determinant <= 1e-6 * self.values * self.ones {
            return (self.slope / self.values, 0.0);
        }
        let x = (self.slope * self.ones - self.offset * self.both) / determinant;
        (x, self.best_min(x))
    }
}
