//! Finds intel-ipsec-mb by compiling and linking a probe; without it the crate reports "not available".

use std::env;
use std::path::{Path, PathBuf};

/// Cache lines that a GCM context may take, smallest first: 16 for version 1.3, 20 for 2.0.
const CONTEXT_LINES: std::ops::RangeInclusive<usize> = 16..=32;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(have_ipsec_mb)");
    println!("cargo::rerun-if-env-changed=ESPLANADE_IPSEC_MB");
    for file in ["build.rs", "src/shim.c", "src/shim.h", "src/probe.c"] {
        println!("cargo::rerun-if-changed={file}");
    }
    let wanted = env::var("ESPLANADE_IPSEC_MB").as_deref() != Ok("0");
    let target = env::var("CARGO_CFG_TARGET_ARCH");
    if !wanted || target.as_deref() != Ok("x86_64") {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let Some(lines) = CONTEXT_LINES.into_iter().find(|n| probe(&out, *n)) else {
        return;
    };
    let compiled = cc::Build::new()
        .file("src/shim.c")
        .define("ESPLANADE_CONTEXT_LINES", lines.to_string().as_str())
        .opt_level(3)
        .flag("-std=gnu11")
        .warnings(true)
        .extra_warnings(true)
        .try_compile("esplanade_ipsec_mb");
    if let Err(e) = compiled {
        println!("cargo::warning=intel-ipsec-mb is installed, but its shim does not compile: {e}");
        return;
    }
    println!("cargo::rustc-link-lib=dylib=IPSec_MB");
    println!("cargo::rustc-cfg=have_ipsec_mb");
    println!("cargo::rustc-env=ESPLANADE_CONTEXT_LINES={lines}");
}

/// Whether a program that holds a context in `lines` cache lines compiles and links.
fn probe(out: &Path, lines: usize) -> bool {
    let compiler = match cc::Build::new().cargo_metadata(false).try_get_compiler() {
        Ok(c) => c,
        Err(_) => return false,
    };
    let status = compiler
        .to_command()
        .arg(format!("-DESPLANADE_CONTEXT_LINES={lines}"))
        .args(["-std=gnu11", "src/probe.c", "-lIPSec_MB", "-o"])
        .arg(out.join("probe"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    status.is_ok_and(|s| s.success())
}
