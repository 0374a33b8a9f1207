//! Where experts live: mapped file; later a cache of slots, GPU buffers.
