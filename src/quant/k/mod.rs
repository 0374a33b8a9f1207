//! K-quants: super-blocks of 256 weights.

use bytemuck::{Pod, Zeroable};

use super::{Block, BlockType, Encode};

macro_rules! outline {
    ($name:ident, $kind:ident, $bytes:literal) => {
        /// A super-block of 256 weights.
        #[derive(Clone, Copy, Debug, Pod, Zeroable)]
        #[repr(C)]
        pub struct $name([u8; $bytes]);

        impl Block for $name {
            const TYPE: BlockType = BlockType::$kind;
            const LEN: usize = 256;

            fn decode(&self, _weights: &mut [f32]) {
                todo!()
            }
        }

        impl Encode for $name {
            fn encode_row(_row: &[f32], _importance: Option<&[f32]>, _blocks: &mut [Self]) {
                todo!()
            }
        }
    };
}

outline!(BlockQ2K, Q2_K, 84);
outline!(BlockQ3K, Q3_K, 110);
outline!(BlockQ4K, Q4_K, 144);
outline!(BlockQ5K, Q5_K, 176);
outline!(BlockQ6K, Q6_K, 210);
