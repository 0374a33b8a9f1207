//! The thread pool: permanent workers that spin, then park.
