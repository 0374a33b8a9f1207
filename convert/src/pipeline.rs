//! The conversion itself: read, encode, write.
//!
//! Three stages work at the same time, bounded queues between them: a thread reads chunks of rows
//! by position, the pool encodes them, a thread appends them to `OUT.gguf.partial`. A chunk is 4 Mi weights,
//! or one row if that is longer, and a handful are under way, so memory does not grow with the checkpoint. When the last
//! tensor is on the disk, the file gets its final name in one step.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use fewbit::adapter::{Adapter, Chosen};
use fewbit::gguf::{Writer, with_suffix};
use fewbit::quant::BlockType;
use indicatif::ProgressBar;
use regex::Regex;

use crate::checkpoint::{Checkpoint, InputFile, Source, Tensor};
use crate::disk;
use crate::encode::Job;
use crate::error::{Error, Result};
use crate::fit::{self, Fitted, Target};
use crate::imatrix::{self, Imatrix, Thin};
use crate::journal::{Fingerprint, InputPrint, Journal};
use crate::merge::{self, Corrections};
use crate::moments::Moments;
use crate::output::Output;
use crate::plan::Plan;
use crate::recipe::Mix;
use crate::round::{Round, Rounder};

/// Chunks that wait between two stages.
const QUEUE: usize = 2;

/// What a conversion is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The recipe.
    pub mix: Mix,
    /// Exceptions from it, in the order of the command line.
    pub overrides: Vec<(Regex, BlockType)>,
    /// Importance matrix that guides the encoding.
    pub imatrix: Option<PathBuf>,
    /// LoRA adapters that are added to the weights before they are encoded.
    pub lora: Vec<Chosen>,
    /// How weights are rounded; anything but ggml's way needs an imatrix.
    pub round: Round,
    /// The size that types are chosen for, in place of the recipe's.
    pub fit: Option<Target>,
    /// Threads that encode; 0 for one a logical CPU.
    pub threads: usize,
    /// Replace an existing output.
    pub force: bool,
    /// Accept quantized sources.
    pub allow_requantize: bool,
    /// How often finished tensors are brought to the disk and noted for a later run to go on from.
    pub record_every: Duration,
}

impl Options {
    /// A conversion by a recipe alone.
    pub fn new(mix: Mix) -> Options {
        Options {
            mix,
            overrides: Vec::new(),
            imatrix: None,
            lora: Vec::new(),
            round: Round::Ggml,
            fit: None,
            threads: 0,
            force: false,
            allow_requantize: false,
            record_every: Duration::from_secs(2),
        }
    }

    /// The types that the size asked for leads to, if one is.
    ///
    /// # Errors
    /// As [`fit::fit`].
    pub(crate) fn fitted(
        &self,
        checkpoint: &mut Checkpoint,
        progress: &ProgressBar,
    ) -> Result<Option<Fitted>> {
        let fit = |target| fit::fit(checkpoint, self, target, progress);
        self.fit.map(fit).transpose()
    }

    /// The same with the types that were chosen; those that the command line gives come first.
    pub(crate) fn with(&self, fitted: Option<&Fitted>) -> Self {
        let mut options = self.clone();
        options
            .overrides
            .extend(fitted.iter().flat_map(|f| f.overrides()));
        options
    }

    /// The moments that rounding goes by.
    pub(crate) fn moments(&self) -> Result<Option<Moments>> {
        match (self.round, &self.imatrix) {
            (Round::Ggml, _) => Ok(None),
            (round, None) => Err(Error::NoStatistics { round }),
            (Round::Best, Some(_)) => Ok(None),
            (round, Some(path)) => {
                let moments = Moments::open(path)?;
                let what = format!(
                    "holds no moments, which --round {round} goes by: make it with fewbit calibrate --moments, or take --round best"
                );
                moments.map(Some).ok_or_else(|| imatrix::fault(path, what))
            }
        }
    }
}

/// What a conversion did.
#[derive(Debug)]
pub struct Report {
    /// The output.
    pub path: PathBuf,
    /// What it holds.
    pub plan: Plan,
    /// The types that were chosen for a size.
    pub fitted: Option<Fitted>,
    /// Bytes of weights that were read in this run.
    pub bytes_read: u64,
    /// Experts whose own statistics are too few.
    pub thin: Vec<Thin>,
    /// Tensors that an earlier run, cut off, had written.
    pub tensors_kept: usize,
    /// Time that it took.
    pub elapsed: Duration,
}

/// Converts `input`, a folder or a GGUF file, into `output`.
///
/// `progress` gets the number of bytes to read, their course and the tensors' names.
///
/// # Errors
/// Whatever is wrong with the input or the system; nothing is then left under the name `output`, and what was
/// written is kept beside it for the next run with the same arguments, unless it is of no use.
pub fn convert(
    input: &Path,
    output: &Path,
    options: &Options,
    progress: &ProgressBar,
) -> Result<Report> {
    let started = Instant::now();
    Output::check(output, options.force)?;
    let mut checkpoint = Checkpoint::open(input)?;
    let inputs = checkpoint.files.iter().map(|f| f.path.as_path());
    let adapters = options.lora.iter().map(|chosen| chosen.path.as_path());
    Output::refuse_inputs(
        output,
        inputs.chain(options.imatrix.as_deref()).chain(adapters),
    )?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build();
    let pool =
        pool.map_err(|e| Error::io("start threads for", output)(std::io::Error::other(e)))?;
    let fitted = pool.install(|| options.fitted(&mut checkpoint, progress))?;
    let options = &options.with(fitted.as_ref());
    let imatrix = options.imatrix.as_deref().map(Imatrix::read).transpose()?;
    let moments = options.moments()?;
    let promise = fitted.as_ref().map(|fitted| fitted.kld);
    let plan = Plan::new(&mut checkpoint, options, imatrix.as_ref(), promise)?;

    let adapters = merge::open(
        &options.lora,
        &plan.shape,
        &checkpoint,
        options.allow_requantize,
    )?;

    let present = fs::metadata(with_suffix(output, ".partial")).map_or(0, |found| found.len());
    disk::require(output, plan.layout.file_bytes().saturating_sub(present))?;
    let file = Output::claim(output, options.force)?;
    let journal = Journal::new(
        file.partial(),
        fingerprint(&checkpoint, &plan, &adapters, options)?,
    );
    let (writer, kept) = open_writer(file.partial(), &plan, &journal)?;

    let run = Run {
        checkpoint: &checkpoint,
        plan: &plan,
        imatrix: imatrix.as_ref(),
        round: options.round,
        moments: moments.as_ref(),
        adapters: &adapters,
        kept,
        progress,
    };
    if let Err(error) = run.stages(writer, &journal, &pool, options.record_every) {
        if matches!(error, Error::NotFinite { .. } | Error::TooLarge { .. }) {
            journal.remove();
            file.discard(); // no later run can make use of it
        }
        return Err(error);
    }
    file.finish()?;
    if let Some(fitted) = &fitted {
        fitted.save(&with_suffix(output, ".types"))?;
    }
    journal.remove();
    let bytes_read = run.bytes_to_read();
    let leaning = imatrix.iter().filter(|_| options.round != Round::Ggml);
    let leaning = leaning.flat_map(|imatrix| imatrix.thin(&checkpoint.tensors));
    let thin = leaning.collect();
    Ok(Report {
        path: output.to_owned(),
        plan,
        fitted,
        bytes_read,
        thin,
        tensors_kept: kept,
        elapsed: started.elapsed(),
    })
}

/// A chunk of a tensor's rows on its way, stored or encoded.
struct Chunk {
    tensor: usize,
    first_row: usize,
    bytes: Vec<u8>,
}

struct Run<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    imatrix: Option<&'a Imatrix>,
    round: Round,
    moments: Option<&'a Moments>,
    adapters: &'a [(Adapter, f32)],
    kept: usize,
    progress: &'a ProgressBar,
}

impl Run<'_> {
    fn bytes_to_read(&self) -> u64 {
        self.checkpoint.tensors[self.kept..]
            .iter()
            .map(|t| t.stored_bytes())
            .sum()
    }

    fn stages(
        &self,
        writer: Writer,
        journal: &Journal,
        pool: &rayon::ThreadPool,
        record_every: Duration,
    ) -> Result<()> {
        self.progress.set_length(self.bytes_to_read());
        let tensors = self.plan.kinds.len();
        let (to_encode, stored) = sync_channel(QUEUE);
        let (to_write, encoded) = sync_channel(QUEUE);
        thread::scope(|scope| {
            let reader = scope.spawn(move || self.read(&to_encode));
            let writer =
                scope.spawn(move || write(writer, tensors, journal, &encoded, record_every));
            let encoding = self.encode(pool, stored, to_write);
            // A stage whose neighbour failed stops without an error of its own; the neighbour has it.
            let writing = writer.join().expect("the writer does not panic");
            let reading = reader.join().expect("the reader does not panic");
            encoding.and(writing).and(reading)
        })
    }

    fn read(&self, to_encode: &SyncSender<Chunk>) -> Result<()> {
        for (index, tensor) in self.checkpoint.tensors.iter().enumerate().skip(self.kept) {
            for rows in tensor.chunks() {
                let mut chunk = Chunk {
                    tensor: index,
                    first_row: rows.start,
                    bytes: Vec::new(),
                };
                self.checkpoint.read_rows(tensor, rows, &mut chunk.bytes)?;
                if to_encode.send(chunk).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn encode(
        &self,
        pool: &rayon::ThreadPool,
        stored: Receiver<Chunk>,
        to_write: SyncSender<Chunk>,
    ) -> Result<()> {
        let (mut rounder, mut corrections) = (None, None);
        for chunk in stored {
            let tensor = &self.checkpoint.tensors[chunk.tensor];
            let kind = self.plan.kinds[chunk.tensor];
            if chunk.first_row == 0 {
                self.progress.set_message(tensor.name.clone());
                corrections = Corrections::of(self.adapters, tensor);
                rounder = match self.imatrix {
                    Some(imatrix) => Rounder::new(self.round, kind, tensor, imatrix, self.moments)?,
                    None => None,
                };
            }
            if let Some(rounder) = &mut rounder {
                let row_bytes = stored_kind(tensor).row_bytes(tensor.columns());
                let rows = chunk.bytes.len() / row_bytes.expect("checked when opened");
                let expert = |row: usize| row / tensor.rows_per_expert();
                let last = expert(chunk.first_row + rows - 1);
                pool.install(|| rounder.prepare(expert(chunk.first_row)..last + 1))?;
            }
            let job = Job {
                from: stored_kind(tensor),
                to: kind,
                columns: tensor.columns(),
                first_row: chunk.first_row,
                rows_per_expert: tensor.rows_per_expert(),
                importance: self.imatrix.map(|i| i.of(tensor)).transpose()?.flatten(),
                rounder: rounder.as_ref(),
                corrections: corrections.as_ref(),
            };
            let mut bytes = Vec::new();
            let encoded = pool.install(|| job.encode(&chunk.bytes, &mut bytes));
            encoded.map_err(|bad| bad.error(&self.checkpoint.path, &tensor.name, job.to))?;
            self.progress.inc(chunk.bytes.len() as u64);
            if to_write.send(Chunk { bytes, ..chunk }).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Type of a tensor's rows as they come from the reader.
fn stored_kind(tensor: &Tensor) -> BlockType {
    match tensor.source {
        Source::Stored { kind, .. } => kind,
        Source::Computed(_) => BlockType::F32,
    }
}

/// Appends chunks as they come; notes from time to time, and when it has to stop, which tensors are whole.
fn write(
    mut writer: Writer,
    tensors: usize,
    journal: &Journal,
    encoded: &Receiver<Chunk>,
    record_every: Duration,
) -> Result<()> {
    let mut recorded = (Instant::now(), writer.tensors_done());
    let mut record = |writer: &mut Writer, now: bool| {
        let (at, done) = recorded;
        if writer.tensors_done() > done && (now || at.elapsed() >= record_every) {
            writer.sync()?;
            journal.record(writer.tensors_done())?;
            recorded = (Instant::now(), writer.tensors_done());
        }
        Ok::<(), Error>(())
    };

    for chunk in encoded {
        writer.write(&chunk.bytes)?;
        record(&mut writer, false)?;
    }
    if writer.tensors_done() < tensors {
        return record(&mut writer, true); // a stage before this one failed
    }
    Ok(writer.finish()?)
}

/// The writer over the partial file: of an earlier run where there is one that fits, else anew.
fn open_writer(partial: &Path, plan: &Plan, journal: &Journal) -> Result<(Writer, usize)> {
    let done = journal.tensors_done();
    if done > 0
        && let Ok(writer) = Writer::resume(partial, plan.layout.clone(), done)
    {
        return Ok((writer, done));
    }
    journal.remove();
    Ok((Writer::create(partial, plan.layout.clone())?, 0))
}

fn fingerprint(
    checkpoint: &Checkpoint,
    plan: &Plan,
    adapters: &[(Adapter, f32)],
    options: &Options,
) -> Result<Fingerprint> {
    let mut inputs: Vec<InputPrint> = checkpoint.files.iter().map(InputPrint::from).collect();
    if let Some(imatrix) = &options.imatrix {
        inputs.push(InputPrint::from(&InputFile::open(imatrix)?));
    }
    for file in adapters.iter().flat_map(|(adapter, _)| &adapter.files) {
        inputs.push(InputPrint::from(&InputFile::open(file)?));
    }
    Ok(Fingerprint {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        inputs,
        types: plan.kinds.iter().map(|k| k.to_string()).collect(),
        round: options.round.to_string(),
        adapters: options
            .lora
            .iter()
            .map(|chosen| chosen.scale.to_string())
            .collect(),
    })
}
