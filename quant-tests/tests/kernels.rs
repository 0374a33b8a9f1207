//! Every table of kernels that this machine offers, held against arithmetic in f64.

use fewbit::kernels::activations::{SCALE_LEN, SUM_LEN};
use fewbit::kernels::{Activation, Activations, Kernels, Phase, STREAMS, TILE_ROWS};
use fewbit::quant::BlockType;
use fewbit::tensor::Rows;
use fewbit::threads::Pool;
use half::{bf16, f16};
use quant_tests::products::products;
use rand::rngs::ChaCha8Rng;
use rand::{Rng, RngExt, SeedableRng};

/// Rounding in f32 may cost this share of `Σ |weight · activation|`.
const TOLERANCE: f64 = 1e-5;

/// Row lengths: a block, a few, an odd number of them, those of real models.
const COLS: [usize; 10] = [32, 64, 96, 256, 512, 576, 768, 1536, 4096, 14336];

/// Row lengths for floats, whose blocks are single weights.
const FLOAT_COLS: [usize; 8] = [1, 7, 8, 31, 33, 100, 256, 4100];

fn is_float(kind: BlockType) -> bool {
    kind.block_len() == 1
}

fn cols_of(kind: BlockType) -> impl Iterator<Item = usize> {
    let cols: &[usize] = if is_float(kind) { &FLOAT_COLS } else { &COLS };
    cols.iter()
        .copied()
        .filter(move |&cols| kind.row_bytes(cols).is_some())
}

/// Where a block holds f16 scales.
fn scale_places(kind: BlockType) -> &'static [usize] {
    use BlockType::*;
    match kind {
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS => &[0],
        Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
        Q2_K => &[80, 82],
        Q3_K => &[108],
        Q6_K => &[208],
        F32 | F16 | BF16 | MXFP4 => &[],
    }
}

/// Makes any bytes a row of finite weights of ordinary size.
fn set_scales(kind: BlockType, bytes: &mut [u8], rng: &mut ChaCha8Rng) {
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        for &at in scale_places(kind) {
            let scale = f16::from_f32(rng.random_range(-0.1..0.1f32));
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        let value = rng.random_range(-1.0..1.0f32);
        match kind {
            BlockType::MXFP4 => block[0] = rng.random_range(118..130),
            BlockType::F32 => block.copy_from_slice(&value.to_le_bytes()),
            BlockType::F16 => block.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            BlockType::BF16 => block.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            _ => {}
        }
    }
}

/// `rows` rows of random blocks that start `shift` bytes into an allocation and end with it.
struct Weights {
    kind: BlockType,
    cols: usize,
    shift: usize,
    bytes: Vec<u8>,
}

impl Weights {
    fn random(
        kind: BlockType,
        rows: usize,
        cols: usize,
        shift: usize,
        rng: &mut ChaCha8Rng,
    ) -> Self {
        let mut bytes = vec![0; shift + rows * kind.row_bytes(cols).unwrap()];
        rng.fill_bytes(&mut bytes);
        set_scales(kind, &mut bytes[shift..], rng);
        Weights {
            kind,
            cols,
            shift,
            bytes,
        }
    }

    fn rows(&self) -> Rows<'_> {
        Rows::new(self.kind, self.cols, &self.bytes[self.shift..]).unwrap()
    }
}

fn activations(kernels: &Kernels, x: &[f32]) -> Activations {
    all_activations(kernels, x.len(), x)
}

/// Rows of `cols` activations.
fn all_activations(kernels: &Kernels, cols: usize, x: &[f32]) -> Activations {
    let tokens = x.len() / cols;
    let mut activations = Activations::new(tokens, cols);
    activations.fill(&Pool::new(1).unwrap(), kernels, tokens, |t, row| {
        row.copy_from_slice(&x[t * cols..(t + 1) * cols]);
    });
    activations
}

/// Ordinary activations with a few loud channels.
fn random_x(cols: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let loud = |rng: &mut ChaCha8Rng| if rng.random_ratio(1, 50) { 30.0 } else { 1.0 };
    (0..cols)
        .map(|_| loud(rng) * rng.random_range(-1.0..1.0f32))
        .collect()
}

/// What the 8-bit activations stand for; the activations themselves where the kernel takes
/// those.
fn as_seen(kind: BlockType, x: Activation<'_>) -> Vec<f64> {
    if is_float(kind) {
        return x.x.iter().map(|&x| f64::from(x)).collect();
    }
    let value = |(i, &q): (usize, &i8)| f64::from(q) * f64::from(x.scales[i / SCALE_LEN]);
    let mut seen: Vec<f64> = x.q.iter().enumerate().map(value).collect();
    for loud in x.loud {
        seen[loud.column as usize] += f64::from(loud.x);
    }
    seen
}

/// `Σ w·x` and `Σ |w·x|` of a row in f64.
fn reference(rows: Rows<'_>, index: usize, x: &[f64]) -> (f64, f64) {
    let mut weights = vec![0.0; rows.cols];
    rows.decode(index, &mut weights);
    let terms = weights.iter().zip(x).map(|(&w, x)| f64::from(w) * x);
    terms.fold((0.0, 0.0), |(sum, size), term| {
        (sum + term, size + term.abs())
    })
}

/// The first row on which `dots` differ from the reference by more than rounding.
fn disagreement(rows: Rows<'_>, x: &[f64], dots: &[f32]) -> Option<String> {
    (0..rows.len()).find_map(|index| {
        let (expected, size) = reference(rows, index, x);
        let error = (f64::from(dots[index]) - expected).abs();
        let agrees = error <= TOLERANCE * size;
        (!agrees).then(|| {
            let (kind, cols) = (rows.kind, rows.cols);
            format!(
                "{kind}, {cols} columns, row {index}: {} for {expected}, size {size}",
                dots[index]
            )
        })
    })
}

fn dots(kernels: &Kernels, rows: Rows<'_>, x: Activation<'_>) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows.len()];
    kernels.dot_rows(rows, x, &mut out);
    out
}

/// The products of a tile as a prompt has them, one row a token.
fn tile(kernels: &Kernels, rows: Rows<'_>, x: &[Activation<'_>]) -> Vec<Vec<f32>> {
    let out = products(kernels, Phase::Prompt, rows, x);
    out.iter().map(|sums| sums[..rows.len()].to_vec()).collect()
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn tables_have_the_names_they_are_chosen_by() {
    let tables = Kernels::available();
    assert_eq!(tables[0].name, "scalar");
    assert_eq!(tables.last().unwrap().name, Kernels::best().name);
    for table in tables {
        assert_eq!(Kernels::named(table.name).unwrap().name, table.name);
    }
    assert!(Kernels::named("abacus").is_none());
    // What an emulated processor must not fail to offer.
    if let Ok(widest) = std::env::var("FEWBIT_TEST_WIDEST") {
        assert_eq!(Kernels::best().name, widest);
    }
}

#[test]
fn every_table_dots_every_type_as_f64_does() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for &kind in BlockType::ALL {
        for cols in cols_of(kind) {
            for (shift, rows) in [0, 1, 2, 3, 4, 5, 11].into_iter().enumerate() {
                let weights = Weights::random(kind, rows, cols, shift, &mut rng);
                let x = random_x(cols, &mut rng);
                for kernels in Kernels::available() {
                    let x = activations(kernels, &x);
                    let dots = dots(kernels, weights.rows(), x.row(0));
                    let seen = as_seen(kind, x.row(0));
                    if let Some(what) = disagreement(weights.rows(), &seen, &dots) {
                        panic!("{}: {what}", kernels.name);
                    }
                }
            }
        }
    }
}

#[test]
fn the_comparison_notices_one_wrong_bit() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for &kind in BlockType::ALL {
        // A bit of a code (of a mantissa) somewhere in the block.
        let at = if is_float(kind) {
            kind.block_bytes() - 1
        } else {
            17.min(kind.block_bytes() - 1)
        };
        let cols = 256;
        let weights = Weights::random(kind, 1, cols, 0, &mut rng);
        let mut wrong = Weights::random(kind, 1, cols, 0, &mut rng);
        wrong.bytes.copy_from_slice(&weights.bytes);
        wrong.bytes[at] ^= 1 << 5;
        let x: Vec<f32> = (0..cols).map(|_| rng.random_range(0.5..1.0f32)).collect();
        for kernels in Kernels::available() {
            let x = activations(kernels, &x);
            let dots = dots(kernels, wrong.rows(), x.row(0));
            let seen = as_seen(kind, x.row(0));
            assert!(
                disagreement(weights.rows(), &seen, &dots).is_some(),
                "{}: a wrong bit of {kind} goes unseen",
                kernels.name
            );
        }
    }
}

#[test]
fn extreme_codes_do_not_saturate() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let cols = 512;
    let patterns: [fn(usize) -> f32; 4] = [
        |_| 1.0,
        |_| -1.0,
        |i| if i % 2 == 0 { 1.0 } else { -1.0 },
        |i| if i % 3 == 0 { -1.0 } else { 1.0 },
    ];
    for &kind in BlockType::ALL {
        for byte in [0x00, 0xff, 0x80, 0x7f, 0x81, 0x88, 0x77, 0xf0, 0x0f] {
            let mut weights = Weights::random(kind, 5, cols, 1, &mut rng);
            weights.bytes.fill(byte);
            set_scales(kind, &mut weights.bytes[1..], &mut rng);
            for pattern in patterns {
                let x: Vec<f32> = (0..cols).map(pattern).collect();
                for kernels in Kernels::available() {
                    let x = activations(kernels, &x);
                    let dots = dots(kernels, weights.rows(), x.row(0));
                    let seen = as_seen(kind, x.row(0));
                    if let Some(what) = disagreement(weights.rows(), &seen, &dots) {
                        panic!("{}: bytes {byte:#x}: {what}", kernels.name);
                    }
                    let tile = tile(kernels, weights.rows(), &[x.row(0)]);
                    if let Some(what) = disagreement(weights.rows(), &seen, &tile[0]) {
                        panic!("{}: tile: bytes {byte:#x}: {what}", kernels.name);
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for &kind in BlockType::ALL {
        for cols in cols_of(kind).filter(|&cols| cols <= 1536) {
            let weights = Weights::random(kind, 11, cols, 3, &mut rng);
            let x = random_x(cols, &mut rng);
            for table in Kernels::available() {
                let x = activations(table, &x);
                for kernels in [*table, table.exact()] {
                    let together = dots(&kernels, weights.rows(), x.row(0));
                    for start in 0..11 {
                        for end in start..=11 {
                            let some = dots(&kernels, weights.rows().slice(start..end), x.row(0));
                            let same = some
                                .iter()
                                .zip(&together[start..end])
                                .all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same, "{} {kind} {cols} {start}..{end}", kernels.name);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn runs_side_by_side_have_the_bits_of_their_rows() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let lens = [
        [1; STREAMS],
        [8; STREAMS],
        [32; STREAMS],
        [8, 8, 8, 5],
        [3, 0, 7, 32],
    ];
    for &kind in BlockType::ALL {
        for cols in cols_of(kind) {
            for lens in lens {
                let total = lens.iter().sum();
                let weights = Weights::random(kind, total, cols, 1, &mut rng);
                let mut start = 0;
                let runs = lens.map(|len| {
                    start += len;
                    weights.rows().slice(start - len..start)
                });
                let mut x = random_x(2 * cols, &mut rng);
                // A loud column in the second token.
                x[cols + cols / 3] = 100.0;
                for kernels in Kernels::available() {
                    let x = all_activations(kernels, cols, &x);
                    let x = [x.row(0), x.row(1)];
                    for count in 1..=STREAMS {
                        let mut out = [[[f32::NAN; TILE_ROWS]; STREAMS]; 2];
                        kernels.dots(&runs[..count], &x, &mut out);
                        for (x, out) in x.iter().zip(&out) {
                            for (&run, out) in runs[..count].iter().zip(out) {
                                let alone = dots(kernels, run, *x);
                                assert!(
                                    same_bits(&out[..run.len()], &alone),
                                    "{}: {kind}, {cols} columns, {count} runs of {lens:?}",
                                    kernels.name
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_table_multiplies_tiles_as_f64_does() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let shapes = [
        (1, 1),
        (5, 70),
        (15, 2),
        (16, 3),
        (17, 4),
        (31, 5),
        (32, 13),
    ];
    for &kind in BlockType::ALL {
        for (index, cols) in cols_of(kind).enumerate() {
            for (shift, (rows, tokens)) in shapes.into_iter().enumerate() {
                if cols > 1536 && (index + shift) % 3 > 0 {
                    continue; // long rows take long
                }
                let weights = Weights::random(kind, rows, cols, shift, &mut rng);
                let x = random_x(tokens * cols, &mut rng);
                for kernels in Kernels::available() {
                    let x = all_activations(kernels, cols, &x);
                    let x: Vec<_> = (0..tokens).map(|t| x.row(t)).collect();
                    let sums = tile(kernels, weights.rows(), &x);
                    for (t, sums) in sums.iter().enumerate() {
                        let seen = as_seen(kind, x[t]);
                        if let Some(what) = disagreement(weights.rows(), &seen, sums) {
                            panic!("{}: token {t} of {tokens}: {what}", kernels.name);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_product_of_a_tile_has_the_same_bits_in_any_company() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let tokens = 23;
    for &kind in BlockType::ALL {
        for cols in cols_of(kind).filter(|&cols| cols <= 1536) {
            let weights = Weights::random(kind, 32, cols, 3, &mut rng);
            let x = random_x(tokens * cols, &mut rng);
            for table in Kernels::available() {
                let x = all_activations(table, cols, &x);
                let x: Vec<_> = (0..tokens).map(|t| x.row(t)).collect();
                for kernels in [*table, table.exact()] {
                    let together = tile(&kernels, weights.rows(), &x);
                    for _ in 0..12 {
                        let (first, last) = (rng.random_range(0..32), rng.random_range(0..32));
                        let rows = first.min(last)..first.max(last) + 1;
                        // Tokens as an expert gathers them: some, not side by side.
                        let mut some: Vec<usize> = (0..tokens).collect();
                        some.retain(|_| rng.random_ratio(2, 5));
                        let gathered: Vec<_> = some.iter().map(|&t| x[t]).collect();
                        let sums = tile(&kernels, weights.rows().slice(rows.clone()), &gathered);
                        for (sums, &t) in sums.iter().zip(&some) {
                            assert!(
                                same_bits(sums, &together[t][rows.clone()]),
                                "{} {kind} {cols}: rows {rows:?}, token {t} of {some:?}",
                                kernels.name
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn exact_tables_multiply_with_the_activations_themselves() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for &kind in BlockType::ALL {
        for cols in cols_of(kind) {
            let weights = Weights::random(kind, 3, cols, 1, &mut rng);
            let x = random_x(cols, &mut rng);
            let unrounded: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            for kernels in Kernels::available() {
                let x = activations(kernels, &x);
                let dots = dots(&kernels.exact(), weights.rows(), x.row(0));
                if let Some(what) = disagreement(weights.rows(), &unrounded, &dots) {
                    panic!("{}: {what}", kernels.name);
                }
                let sums = &tile(&kernels.exact(), weights.rows(), &[x.row(0)])[0];
                if let Some(what) = disagreement(weights.rows(), &unrounded, sums) {
                    panic!("{}: tile: {what}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn rounding_activations_costs_half_a_step_a_column_at_most() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for &kind in BlockType::ALL.iter().filter(|&&kind| !is_float(kind)) {
        let cols = 768;
        let weights = Weights::random(kind, 4, cols, 0, &mut rng);
        let x = random_x(cols, &mut rng);
        for kernels in Kernels::available() {
            let x = activations(kernels, &x);
            let x = x.row(0);
            let rounded = dots(kernels, weights.rows(), x);
            let exact = dots(&kernels.exact(), weights.rows(), x);
            let half_steps: Vec<f64> = (0..cols)
                .map(|i| 0.5 * f64::from(x.scales[i / SCALE_LEN]))
                .collect();
            let seen = as_seen(kind, x);
            for index in 0..4 {
                let (_, bound) = reference(weights.rows(), index, &half_steps);
                let (_, size) = reference(weights.rows(), index, &seen);
                let error = f64::from((rounded[index] - exact[index]).abs());
                assert!(error > 0.0, "{} {kind}: nothing was rounded", kernels.name);
                assert!(
                    error <= bound + 2.0 * TOLERANCE * size,
                    "{} {kind}",
                    kernels.name
                );
            }
        }
    }
}

/// Groups of 32 activations that try every path of the quantizer.
fn awkward_groups(rng: &mut ChaCha8Rng) -> Vec<f32> {
    let mut x = Vec::new();
    for magnitude in [
        0.0, 1e-45, 1e-39, 3e-37, 4e-37, 1e-30, 1e-3, 1.0, 1e4, 1e30, 3.4e38,
    ] {
        x.extend((0..SCALE_LEN).map(|_| magnitude * rng.random_range(-1.0..=1.0f32)));
    }
    // Halves that must go to even; −0; only one weight; the lowest code.
    x.extend((0..SCALE_LEN).map(|i| if i == 0 { 127.0 } else { i as f32 - 16.5 }));
    x.extend([-0.0; SCALE_LEN]);
    x.extend((0..SCALE_LEN).map(|i| if i == 31 { -7.0 } else { 0.0 }));
    x.extend([-1.0; SCALE_LEN]);
    for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        x.extend((0..SCALE_LEN).map(|i| if i == 5 { odd } else { i as f32 }));
        x.extend([odd; SCALE_LEN]);
    }
    x.extend((0..SCALE_LEN).map(|i| [f32::NAN, f32::INFINITY, 1.0, -0.0][i % 4]));
    x.extend((0..1000 * SCALE_LEN).map(|_| f32::from_bits(rng.random())));
    x.extend(random_x(1000 * SCALE_LEN, rng));
    x
}

#[test]
fn every_table_quantizes_activations_to_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let x = awkward_groups(&mut rng);
    let quantized = |kernels: &Kernels| {
        let mut q = vec![1; x.len()];
        let mut scales = vec![1.0; x.len() / SCALE_LEN];
        let mut sums = vec![1; x.len() / SUM_LEN];
        (kernels.quantize)(&x, &mut q, &mut scales, &mut sums);
        // Which NaN it is, is left open.
        let bits = |scale: &f32| {
            if scale.is_nan() {
                u32::MAX
            } else {
                scale.to_bits()
            }
        };
        let scales: Vec<u32> = scales.iter().map(bits).collect();
        (q, scales, sums)
    };
    let truth = quantized(Kernels::named("scalar").unwrap());
    for kernels in Kernels::available() {
        assert!(quantized(kernels) == truth, "{}", kernels.name);
    }

    let (q, scales, sums) = truth;
    for (g, x) in x.chunks_exact(SCALE_LEN).enumerate() {
        let q = &q[g * SCALE_LEN..][..SCALE_LEN];
        let scale = f32::from_bits(scales[g]);
        let wild = x.iter().any(|x| !x.is_finite());
        assert_eq!(wild, !scale.is_finite(), "group {g} has scale {scale}");
        assert!(q.iter().all(|&q| q >= -127));
        for (half, q) in q.chunks_exact(SUM_LEN).enumerate() {
            let sum: i32 = q.iter().map(|&q| i32::from(q)).sum();
            assert_eq!(sum, i32::from(sums[g * SCALE_LEN / SUM_LEN + half]));
        }
        for (&q, &x) in q.iter().zip(x).filter(|_| !wild && scale > 3e-39) {
            let error = (f64::from(q) * f64::from(scale) - f64::from(x)).abs();
            assert!(error <= 0.501 * f64::from(scale), "group {g}: {q} for {x}");
        }
    }
}

#[test]
fn a_nan_among_the_activations_is_not_hidden() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for &kind in BlockType::ALL {
        for odd in [f32::NAN, f32::INFINITY] {
            let weights = Weights::random(kind, 5, 256, 0, &mut rng);
            let mut x = random_x(256, &mut rng);
            x[77] = odd;
            for kernels in Kernels::available() {
                let x = activations(kernels, &x);
                let dots = dots(kernels, weights.rows(), x.row(0));
                let name = kernels.name;
                assert!(
                    dots.iter().all(|dot| !dot.is_finite()),
                    "{name} {kind}: {dots:?}"
                );
                let tile = tile(kernels, weights.rows(), &[x.row(0)]);
                assert!(
                    tile[0].iter().all(|sum| !sum.is_finite()),
                    "{name} {kind}: {tile:?}"
                );
            }
        }
    }
}

#[test]
fn damage_shows_in_every_product() {
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    let sound = random_x(256, &mut rng);
    for kind in [
        BlockType::Q4_0,
        BlockType::Q4_K,
        BlockType::Q6_K,
        BlockType::Q8_0,
    ] {
        let weights = Weights::random(kind, 3, 256, 0, &mut rng);
        for kernels in Kernels::available() {
            let nan_in = |rows: Rows<'_>, x: &[f32]| {
                let x = all_activations(kernels, 256, &x.repeat(20));
                let x: Vec<_> = (0..20).map(|t| x.row(t)).collect();
                [Phase::Prompt, Phase::Generate].map(|phase| {
                    let out = products(kernels, phase, rows, &x);
                    out.iter()
                        .map(|out| [0, 1, 2].map(|r| out[r].is_nan()))
                        .collect::<Vec<_>>()
                })
            };
            for wild in [f32::NAN, f32::INFINITY] {
                let mut x = sound.clone();
                x[77] = wild;
                let name = kernels.name;
                let all = [vec![[true; 3]; 20], vec![[true; 3]; 20]];
                assert_eq!(nan_in(weights.rows(), &x), all, "{name} {kind}");

                let mut damaged = weights.bytes.clone();
                let at = kind.row_bytes(256).unwrap() + scale_places(kind)[0];
                damaged[at..at + 2].copy_from_slice(&f16::from_f32(wild).to_le_bytes());
                let damaged = Rows::new(kind, 256, &damaged).unwrap();
                let [prompt, generate] = nan_in(damaged, &sound);
                let finite = |out: &[bool; 3]| !out[0] && !out[2];
                assert!(prompt.iter().all(finite) && generate.iter().all(finite));
                if wild.is_nan() {
                    assert!(prompt.iter().all(|out| out[1]), "{name} {kind}");
                    assert!(generate.iter().all(|out| out[1]), "{name} {kind}");
                }
            }
        }
    }
}
