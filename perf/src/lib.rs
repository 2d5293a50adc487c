//! Benchmarks of the Esplanade gateway.
