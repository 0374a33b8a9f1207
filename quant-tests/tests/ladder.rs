//! The ladder of the fixture: fewer bits, more divergence, in every language.

use fewbit::engine::Options;
use fewbit::perplexity::{Chunks, Tally, score};
use quant_tests::fixture::{self, LANGUAGES};

const CONTEXT: usize = 512;
const CHUNKS: usize = 6;

#[test]
fn divergence_grows_as_bits_fall_in_every_language() {
    let base_file = fixture::tiny_mixtral("F32");
    let base = base_file.load(&Options::default());
    let rungs = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"].map(|mix| {
        let file = fixture::tiny_mixtral(mix);
        (mix, file.load(&Options::default()), file)
    });
    for language in LANGUAGES {
        let text = fixture::text(language);
        let chunks = Chunks::new(base.tokenizer(), &text, CONTEXT, Some(CHUNKS)).unwrap();
        let mut tallies: Vec<Tally> = rungs.iter().map(|_| Tally::default()).collect();
        let mut base_session = base.session(CONTEXT).unwrap();
        for index in 0..chunks.len() {
            let reference = score(&mut base_session, &chunks, index).unwrap();
            for ((_, engine, _), tally) in rungs.iter().zip(&mut tallies) {
                let scored = score(&mut engine.session(CONTEXT).unwrap(), &chunks, index).unwrap();
                tally.add(engine.pool(), &scored, Some(&reference));
            }
        }
        let divergences: Vec<f64> = tallies
            .iter()
            .map(|tally| tally.divergence().kld.value)
            .collect();
        println!(
            "{language}: base PPL {:.2}, KLD {divergences:.5?}",
            tallies[0].divergence().base.value
        );
        assert!(divergences[0] > 0.0);
        for (pair, rung) in divergences.windows(2).zip(rungs.windows(2)) {
            assert!(
                pair[0] < pair[1],
                "{language}: {} diverges more than {}",
                rung[0].0,
                rung[1].0
            );
        }
    }
}
