//! Safetensors files, written as the weights come.
//!
//! A file is the length of its table (8 bytes), the table as JSON (name → type, extents, first and last byte of the data)
//! and the data: <https://github.com/huggingface/safetensors#format>.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json, json};

use crate::error::{Error, Result};

/// A tensor that is going to be written.
pub(super) struct Stored {
    pub(super) name: String,
    /// Slowest extent first.
    pub(super) shape: Vec<usize>,
    pub(super) bytes: u64,
}

/// Files of weights, each with the tensors that it holds.
pub(super) struct Shards {
    folder: PathBuf,
    dtype: &'static str,
    shards: Vec<Vec<Stored>>,
    /// The file and tensor that comes next.
    next: (usize, usize),
    file: Option<(PathBuf, BufWriter<File>)>,
}

impl Shards {
    /// Distributes tensors over files of up to `most` bytes.
    pub(super) fn plan(
        folder: &Path,
        dtype: &'static str,
        tensors: Vec<Stored>,
        most: u64,
    ) -> Self {
        let mut shards: Vec<Vec<Stored>> = Vec::new();
        let mut bytes = 0;
        for tensor in tensors {
            if shards.is_empty() || bytes + tensor.bytes > most {
                shards.push(Vec::new());
                bytes = 0;
            }
            bytes += tensor.bytes;
            shards.last_mut().expect("there is one").push(tensor);
        }
        Self {
            folder: folder.to_owned(),
            dtype,
            shards,
            next: (0, 0),
            file: None,
        }
    }

    fn name(&self, shard: usize) -> String {
        match self.shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
        }
    }

    /// The next tensor begins.
    pub(super) fn begin(&mut self) -> Result<()> {
        let (shard, tensor) = self.next;
        if tensor == 0 {
            self.close()?;
            let path = self.folder.join(self.name(shard));
            let file = File::create(&path).map_err(Error::io("create", &path))?;
            let mut file = BufWriter::new(file);
            let table = self.table(shard);
            file.write_all(&(table.len() as u64).to_le_bytes())
                .and_then(|()| file.write_all(table.as_bytes()))
                .map_err(Error::io("write", &path))?;
            self.file = Some((path, file));
        }
        self.next = match tensor + 1 < self.shards[shard].len() {
            true => (shard, tensor + 1),
            false => (shard + 1, 0),
        };
        Ok(())
    }

    /// A file's table, padded so that the data begins at a multiple of 8.
    fn table(&self, shard: usize) -> String {
        let mut table = Map::new();
        table.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut start = 0;
        for tensor in &self.shards[shard] {
            let end = start + tensor.bytes;
            let entry =
                json!({"dtype": self.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
            table.insert(tensor.name.clone(), entry);
            start = end;
        }
        let mut text = Json::Object(table).to_string();
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        text
    }

    /// Bytes of the tensor that has begun.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let (path, file) = self.file.as_mut().expect("a tensor has begun");
        file.write_all(bytes).map_err(Error::io("write", path))
    }

    fn close(&mut self) -> Result<()> {
        let Some((path, file)) = self.file.take() else {
            return Ok(());
        };
        let file = file.into_inner().map_err(|error| error.into_error());
        file.and_then(|file| file.sync_all())
            .map_err(Error::io("write", &path))
    }

    /// Ends the last file and writes the index, where there are several; gives their number.
    pub(super) fn finish(mut self) -> Result<usize> {
        self.close()?;
        let count = self.shards.len();
        if count > 1 {
            let mut weights = Map::new();
            for (shard, tensors) in self.shards.iter().enumerate() {
                for tensor in tensors {
                    weights.insert(tensor.name.clone(), Json::String(self.name(shard)));
                }
            }
            let bytes: u64 = self
                .shards
                .iter()
                .flatten()
                .map(|tensor| tensor.bytes)
                .sum();
            let index = json!({"metadata": {"total_size": bytes}, "weight_map": weights});
            let path = self.folder.join("model.safetensors.index.json");
            std::fs::write(&path, super::config::pretty(&index))
                .map_err(Error::io("write", &path))?;
        }
        Ok(count)
    }
}
