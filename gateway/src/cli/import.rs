//! `import`: other programs' SAs and policies as a native SA file.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use sa_store::import::{Format, Imported, Options, detect, import, import_file};
use zeroize::Zeroizing;

use super::Failure;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum From {
    /// `ip xfrm state`, `ip xfrm policy`, or `ip xfrm .. add` lines.
    Xfrm,
    /// DPDK ipsec-secgw.
    Secgw,
    /// setkey (ipsec-tools).
    Setkey,
}

/// `import`
#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// File to read; "-" is standard input.
    file: PathBuf,
    /// Format; found out from the text when not given.
    #[arg(long, value_enum)]
    from: Option<From>,
    /// Own address, where the text does not tell inbound from outbound; may be repeated.
    #[arg(long)]
    local: Vec<IpAddr>,
    /// Consent to weak settings.
    #[arg(long)]
    allow_weak: bool,
    /// The keys were never used: leases start without a record.
    #[arg(long)]
    first_use: bool,
    /// File to make, readable by its owner alone. Standard output when not given.
    #[arg(long, short)]
    output: Option<PathBuf>,
}

pub(super) fn run(args: &ImportArgs) -> Result<(), Failure> {
    let format = args.from.map(|f| match f {
        From::Xfrm => Format::Xfrm,
        From::Secgw => Format::Secgw,
        From::Setkey => Format::Setkey,
    });
    let options = Options {
        local: args.local.clone(),
        allow_weak: args.allow_weak,
        first_use: args.first_use,
    };
    let imported = if args.file == Path::new("-") {
        from_stdin(format, &options)?
    } else {
        import_file(&args.file, format, &options).map_err(Failure::refused)?
    };
    for r in &imported.remarks {
        eprintln!("{}: note: {}", r.at, r.text);
    }
    let text = sa_store::file::to_toml(&imported.config).map_err(Failure::failed)?;
    match &args.output {
        None => std::io::stdout()
            .write_all(text.as_bytes())
            .map_err(Failure::failed),
        Some(path) => {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path);
            let written =
                file.and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()));
            written.map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
        }
    }
}

fn from_stdin(format: Option<Format>, options: &Options) -> Result<Imported, Failure> {
    let mut text = Zeroizing::new(String::new());
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(Failure::failed)?;
    let format = format.or_else(|| detect(&text));
    let format = format
        .ok_or_else(|| Failure::refused("-: the format is not known; name it with --from"))?;
    import(&text, Path::new("-"), format, options).map_err(Failure::refused)
}
