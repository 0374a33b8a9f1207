//! What a file's metadata says about the graph.

use crate::gguf::{Error, Metadata};
use crate::plan::Shape;

/// The graph's numbers.
#[derive(Clone, Debug)]
pub struct Config {
    /// Extents: layers, heads, experts and so on.
    pub shape: Shape,
    /// ε of every RMS norm.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Positions that a token sees, itself included; `None` for all.
    pub sliding_window: Option<usize>,
}

/// Rotary embedding: dimension pair `i` of a head turns by
/// `position · base^(-2i/dims) / (scale · factor_i)`.
#[derive(Clone, Debug)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub base: f32,
    /// Dimensions of a head that turn (an even number, at most the head's).
    pub dims: usize,
    /// Linear scaling: positions are divided by it.
    pub scale: f32,
}

impl Config {
    /// Reads the keys of the llama architecture.
    ///
    /// # Errors
    /// When a key is missing, has the wrong type, or asks for something that the graph does
    /// not compute (another architecture, another form of RoPE scaling).
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, Error> {
        let shape = Shape::from_metadata(metadata)?;
        let key = |name: &str| format!("llama.{name}");
        let norm_eps = metadata.require_f32(&key("attention.layer_norm_rms_epsilon"))?;
        if !(norm_eps.is_finite() && norm_eps >= 0.0) {
            return Err(metadata.error(
                &key("attention.layer_norm_rms_epsilon"),
                "must be a finite number from 0 up",
            ));
        }
        let dims_key = key("rope.dimension_count");
        let dims = metadata
            .u64(&dims_key)?
            .map_or(shape.head_dim, |dims| dims as usize);
        if dims == 0 || dims % 2 != 0 || dims > shape.head_dim {
            return Err(metadata.error(
                &dims_key,
                format!("must be even and at most the head's {}", shape.head_dim),
            ));
        }
        let base = metadata.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        if !(base.is_finite() && base > 0.0) {
            return Err(metadata.error(&key("rope.freq_base"), "must be a positive number"));
        }
        let sliding_window = match metadata.u64(&key("attention.sliding_window"))? {
            None | Some(0) => None,
            Some(window) => Some(window as usize),
        };
        Ok(Self {
            shape,
            norm_eps,
            rope: RopeConfig {
                base,
                dims,
                scale: rope_scale(metadata)?,
            },
            sliding_window,
        })
    }
}

/// The factor of linear scaling; 1 where there is none.
fn rope_scale(metadata: &Metadata) -> Result<f32, Error> {
    const TYPE: &str = "llama.rope.scaling.type";
    const FACTOR: &str = "llama.rope.scaling.factor";
    const OLD: &str = "llama.rope.scale_linear";
    let (key, factor) = match metadata.str(TYPE)? {
        Some("none") => return Ok(1.0),
        Some("linear") | None => match metadata.f32(FACTOR)? {
            Some(factor) => (FACTOR, factor),
            None => (OLD, metadata.f32(OLD)?.unwrap_or(1.0)),
        },
        Some(other) => {
            let problem = format!(
                "RoPE scaling {other:?} is not computed; none, linear and the Llama 3 factors are"
            );
            return Err(metadata.error(TYPE, problem));
        }
    };
    // Files that were written without scaling say 0.
    match factor {
        0.0 => Ok(1.0),
        factor if factor.is_finite() && factor > 0.0 => Ok(factor),
        _ => Err(metadata.error(key, "must be a positive number")),
    }
}
