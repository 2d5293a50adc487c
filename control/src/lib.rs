//! Control thread of the Esplanade gateway.

#![forbid(unsafe_code)]
