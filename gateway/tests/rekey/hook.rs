//! Keys and SA files for both sides.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Writes the part of each side's files that stays, and the script that makes pairs of SAs for a tunnel.
pub(super) fn prepare(dir: &Path) -> PathBuf {
    for site in ["0", "1"] {
        std::fs::create_dir_all(dir.join(site)).unwrap();
    }
    std::fs::create_dir_all(dir.join("state")).unwrap();
    // $1 is the tunnel; its number is behind the letter. SPIs tell tunnel, generation and direction.
    let script = format!(
        r#"#!/bin/sh
set -eu
umask 077
dir={dir}
t=$1
n=${{t#t}}
exec 9>"$dir/state/$t.lock"
flock 9
g=$(cat "$dir/state/$t" 2>/dev/null || echo 0)
g=$((g + 1))
key() {{ od -An -N20 -tx1 /dev/urandom | tr -d ' \n'; }}
ab=$(key)
ba=$(key)
spi_ab=$((0x100000 + n * 0x1000 + g * 2))
spi_ba=$((spi_ab + 1))
case $((n % 3)) in
0) soft='{{ packets = 120 }}' ;;
1) soft='{{ bytes = 6000 }}' ;;
# Longer than a switch takes: a successor that is spent before it sends is replaced before it sends.
*) soft='{{ time = 10 }}' ;;
esac
side() {{
    cat > "$dir/$1/.$t.new" <<END
[[tunnel]]
name = "$t"
local = "192.0.2.$((1 + $1))"
remote = "192.0.2.$((2 - $1))"
suite = "aes-128-gcm-16"
soft = $soft
[[tunnel.sa]]
name = "$t-in-$g"
direction = "in"
spi = $3
key = "$5"
first_use = true
[[tunnel.sa]]
name = "$t-out-$g"
direction = "out"
spi = $2
key = "$4"
first_use = true
[[policy]]
name = "$t-out"
direction = "out"
priority = 10
action = "protect"
tunnel = "$t"
src = "10.$1.$n.0/24"
dst = "10.$((1 - $1)).$n.0/24"
[[policy]]
name = "$t-in"
direction = "in"
priority = 10
action = "protect"
tunnel = "$t"
src = "10.$((1 - $1)).$n.0/24"
dst = "10.$1.$n.0/24"
END
    mv "$dir/$1/.$t.new" "$dir/$1/$t.toml"
}}
# Now one side is first, now the other.
if [ $((g % 2)) = 0 ]; then
    side 0 $spi_ab $spi_ba "$ab" "$ba"
    sleep ${{DELAY:-0.05}}
    side 1 $spi_ba $spi_ab "$ba" "$ab"
else
    side 1 $spi_ba $spi_ab "$ba" "$ab"
    sleep ${{DELAY:-0.05}}
    side 0 $spi_ab $spi_ba "$ab" "$ba"
fi
echo $g > "$dir/state/$t"
"#,
        dir = dir.display()
    );
    let path = dir.join("hook");
    std::fs::write(dir.join("hook.new"), script).unwrap();
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(dir.join("hook.new"), mode).unwrap();
    std::fs::rename(dir.join("hook.new"), &path).unwrap();
    path
}

/// New SAs for a tunnel, as the hook makes them.
pub(super) fn make(hook: &Path, tunnel: usize, delay: &str) {
    let made = std::process::Command::new(hook)
        .arg(format!("t{tunnel}"))
        .env("DELAY", delay)
        .status()
        .unwrap();
    assert!(made.success());
}
