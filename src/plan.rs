//! Sizes from metadata alone: parameters in all and at work, bytes, the RAM that a context needs.
