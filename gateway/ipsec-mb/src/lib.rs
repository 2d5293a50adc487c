//! Safe calls into intel-ipsec-mb, compiled in when its header is found at build time.
