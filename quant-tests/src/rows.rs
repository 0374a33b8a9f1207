//! Generated rows of weights and of importance, the same on every platform: integer arithmetic
//! and single IEEE operations only, no function of the platform's libm.

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator with this seed.
    pub fn new(seed: u64) -> Self {
        SplitMix64(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1 << 24) as f32
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    /// Nearly standard normal: the sum of twelve uniforms, less 6 (Irwin–Hall).
    pub fn normal(&mut self) -> f32 {
        let sum: i64 = (0..12).map(|_| (self.next_u64() >> 40) as i64).sum();
        (sum - (6 << 24)) as f32 / (1 << 24) as f32
    }
}

/// What the weights of a row look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// As trained weights mostly are: normal, σ = 0.02.
    Normal,
    /// Uniform in ±1.
    Uniform,
    /// Cubes of normal weights.
    HeavyTailed,
    /// All above zero, so that a minimum would be positive.
    Positive,
    /// One value throughout.
    Constant,
    /// Nothing but zeros, of either sign.
    Zero,
    /// Zeros but for one weight in ten.
    Sparse,
    /// Normal, and one weight a thousand times as large.
    Outlier,
    /// Another power of two for each 16 weights, some of them all zero.
    Patchy,
    /// Multiples of ½ in ±16: ties for every rounding.
    Ties,
    /// ±1, so that every weight is the largest.
    Signs,
    /// Up to the largest half, ±65504.
    HalfExtremes,
    /// Around 10⁻⁷, where halves are denormal.
    HalfDenormals,
    /// Around 10⁻¹⁵, where ggml begins to take a block for zeros.
    Tiny,
    /// Denormal single-precision floats.
    Denormals,
    /// Around 10³⁰, whose squares overflow.
    Huge,
}

impl Shape {
    /// All of them.
    pub const ALL: [Shape; 16] = [
        Shape::Normal,
        Shape::Uniform,
        Shape::HeavyTailed,
        Shape::Positive,
        Shape::Constant,
        Shape::Zero,
        Shape::Sparse,
        Shape::Outlier,
        Shape::Patchy,
        Shape::Ties,
        Shape::Signs,
        Shape::HalfExtremes,
        Shape::HalfDenormals,
        Shape::Tiny,
        Shape::Denormals,
        Shape::Huge,
    ];

    /// A row of this shape; another for every seed.
    pub fn row(self, cols: usize, seed: u64) -> Vec<f32> {
        let mut random = SplitMix64::new(seed ^ (self as u64) << 56);
        let random = &mut random;
        let mut fill = |weight: &mut dyn FnMut(&mut SplitMix64) -> f32| -> Vec<f32> {
            (0..cols).map(|_| weight(random)).collect()
        };
        match self {
            Shape::Normal => fill(&mut |r| 0.02 * r.normal()),
            Shape::Uniform => fill(&mut |r| 2.0 * r.uniform() - 1.0),
            Shape::HeavyTailed => fill(&mut |r| {
                let x = r.normal();
                0.02 * x * x * x
            }),
            Shape::Positive => fill(&mut |r| 0.5 + 0.1 * r.uniform()),
            Shape::Constant => {
                let constant = fill(&mut |r| r.normal())[0];
                vec![constant; cols]
            }
            Shape::Zero => fill(&mut |r| if r.below(2) == 0 { 0.0 } else { -0.0 }),
            Shape::Sparse => fill(&mut |r| if r.below(10) == 0 { r.normal() } else { 0.0 }),
            Shape::Outlier => {
                let mut row = fill(&mut |r| 0.02 * r.normal());
                row[seed as usize % cols] *= 1000.0;
                row
            }
            Shape::Patchy => {
                let mut row = fill(&mut |r| r.normal());
                let mut random = SplitMix64::new(!seed);
                for patch in row.chunks_mut(16) {
                    let scale = match random.below(12) {
                        0 => 0.0,
                        power => 1.0 / (1u32 << power) as f32,
                    };
                    patch.iter_mut().for_each(|x| *x *= scale);
                }
                row
            }
            Shape::Ties => fill(&mut |r| r.below(65) as f32 / 2.0 - 16.0),
            Shape::Signs => fill(&mut |r| if r.below(2) == 0 { 1.0 } else { -1.0 }),
            Shape::HalfExtremes => fill(&mut |r| match r.below(4) {
                0 => 65504.0,
                1 => -65504.0,
                _ => 65504.0 * (2.0 * r.uniform() - 1.0),
            }),
            Shape::HalfDenormals => fill(&mut |r| 1e-7 * r.normal()),
            Shape::Tiny => fill(&mut |r| 1e-15 * r.normal()),
            Shape::Denormals => fill(&mut |r| 1e-39 * r.normal()),
            Shape::Huge => fill(&mut |r| 1e30 * r.normal()),
        }
    }
}

/// What the importance of the columns looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Importance {
    /// Mean squares of activations: positive, a few columns far above the others.
    Activations,
    /// All columns alike.
    Flat,
    /// Half of the columns were never active.
    HalfZero,
    /// No column was ever active.
    Zero,
}

impl Importance {
    /// All of them.
    pub const ALL: [Importance; 4] = [
        Importance::Activations,
        Importance::Flat,
        Importance::HalfZero,
        Importance::Zero,
    ];

    /// One non-negative weight a column; another row for every seed.
    pub fn row(self, cols: usize, seed: u64) -> Vec<f32> {
        let mut random = SplitMix64::new(!seed ^ (self as u64) << 56);
        let mut weight = || match self {
            Importance::Activations => {
                let x = random.normal();
                let y = if random.below(50) == 0 { 10.0 } else { 1.0 };
                y * x * x
            }
            Importance::Flat => 1.0,
            Importance::HalfZero => random.below(2) as f32 * random.uniform(),
            Importance::Zero => 0.0,
        };
        (0..cols).map(|_| weight()).collect()
    }
}

/// FNV-1a of bytes, 64 bits: names a long row of blocks in a golden file.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
