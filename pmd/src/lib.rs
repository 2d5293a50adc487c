//! Packet memory, ports and the engine interface of the Esplanade gateway.
