# Runs in the guest (busybox sh): $1 is the gateway. Sourced by the cases.
#
#   netns lan ──veth── lan0 [netns gw: gateway, charon] wan0 ──veth── netns peer: charon, the kernel's own ESP
#
# charon in gw puts its SAs into the kernel of gw, where the gateway takes them. Every check that fails ends the script with
# the line "FAILED: …" and status 1.
esplanade=$1
ip=/usr/bin/ip ping=/usr/bin/ping
api=/tmp/api.sock
failed() {
    echo "FAILED: $*"; logs; tail -n 15 /tmp/charon-gw/log
    ns gw $ip -s xfrm state list nokeys | tail -n 40
    ns gw $ip xfrm policy; sas; $esplanade ike --socket $api; $esplanade stats --socket $api | tail -n 40
    exit 1
}
ns() { n=$1; shift; $ip netns exec $n "$@"; }
# seconds, command: waits until it succeeds.
until_true() {
    until=$(($(cut -d. -f1 /proc/uptime) + $1)); shift
    while [ $(cut -d. -f1 /proc/uptime) -le $until ]; do "$@" > /dev/null 2>&1 && return; usleep 100000; done
    return 1
}

cable() { # netns, name, netns, name
    $ip link add $2 netns $1 type veth peer name $4 netns $3
    for end in "$1 $2" "$3 $4"; do
        set -- $end
        for f in accept_dad router_solicitations; do ns $1 sh -c "echo 0 > /proc/sys/net/ipv6/conf/$2/$f" 2> /dev/null; done
        ns $1 ethtool -K $2 tx off rx off tso off gso off gro off > /dev/null
        ns $1 $ip link set $2 up
    done
}
mac() { ns $1 cat /sys/class/net/$2/address; }

# A guest that says nothing for long stands still, and is booted again.
setup() {
    (while sleep 10; do echo "."; done) &
    mkdir -p /run/netns /tmp/site
    for f in rmem_default rmem_max; do echo 8388608 > /proc/sys/net/core/$f; done
    for n in lan gw peer; do $ip netns add $n; ns $n $ip link set lo up; done
    cable lan eth0 gw lan0; cable gw wan0 peer eth0
    ns lan $ip addr add 10.1.0.2/24 dev eth0; ns lan $ip addr add fd01::2/64 dev eth0 nodad
    ns gw $ip addr add 10.1.0.1/24 dev lan0; ns gw $ip addr add fd01::1/64 dev lan0 nodad
    ns gw $ip addr add 192.0.2.1/24 dev wan0; ns gw $ip addr add fd00::1/64 dev wan0 nodad
    ns peer $ip addr add 192.0.2.2/24 dev eth0; ns peer $ip addr add fd00::2/64 dev eth0 nodad
    ns lan $ip route add default via 10.1.0.1; ns lan $ip -6 route add default via fd01::1
    ns gw $ip route add default via 192.0.2.2; ns gw $ip -6 route add default via fd00::2
    for i in $(seq 0 9); do
        ns peer $ip addr add 10.2.$i.1/32 dev lo; ns peer $ip addr add fd02::$i:1/128 dev lo nodad
    done
    ns peer $ip route add 10.1.0.0/16 via 192.0.2.1; ns peer $ip -6 route add fd01::/64 via fd00::1
    (umask 077; : > /tmp/site/sa.toml)
    cat > /tmp/site/gateway.toml <<END
sa_files = ["sa.toml"]
[workers]
count = 1
[memory]
frames = 8192
[[port]]
name = "lan0"
kind = "af_xdp"
side = "inside"
mtu = 1400
addresses = ["10.1.0.1/24", "fd01::1/64"]
af_xdp = { steer_destinations = ["10.2.0.0/16", "fd02::/64"] }
[[port]]
name = "wan0"
kind = "af_xdp"
$tap
side = "outside"
addresses = ["192.0.2.1/24", "fd00::1/64"]
[[route]]
to = "0.0.0.0/0"
via = "192.0.2.2"
[[route]]
to = "::/0"
via = "fd00::2"
[[neighbour]]
ip = "192.0.2.2"
mac = "$(mac peer eth0)"
port = "wan0"
[[neighbour]]
ip = "fd00::2"
mac = "$(mac peer eth0)"
port = "wan0"
[[neighbour]]
ip = "10.1.0.2"
mac = "$(mac lan eth0)"
port = "lan0"
[[neighbour]]
ip = "fd01::2"
mac = "$(mac lan eth0)"
port = "lan0"
$kernel_tables
[ike]
xfrm = true
$ike_options
[sas]
max = 16384
[leases]
path = "leases"
[crypto]
provider = "aws-lc"
[api]
socket = "$api"
[metrics]
${metrics:-enabled = false}
[test]
netlink_delay_ms = ${delay:-0}
END
}

gateway() {
    (exec $ip netns exec gw $esplanade run --config /tmp/site/gateway.toml >> /tmp/gateway.log 2>&1) &
    gateway=$!
    until_true 30 is_ready || failed "the gateway is not ready"
}
# Without the measurements at start.
logs() { grep -v 'not measured' /tmp/gateway.log | tail -n ${1:-25}; }
is_ready() { $esplanade status --json --socket $api | grep -q '"ready": true'; }
logged() { grep -qE "$1" /tmp/gateway.log; }
# What it counts.
stat_of() { $esplanade stats --json --socket $api | tr ',{}' '\n\n\n' | sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p" | head -n 1; }
stop() {
    kill $gateway; wait $gateway || failed "the gateway ended with $?"
    grep -q "every frame is accounted for" /tmp/gateway.log || failed "no account of frames"
}

# charon of a namespace; its connections are in /tmp/charon-NAME/swanctl.conf.
charon() {
    d=/tmp/charon-$1
    mkdir -p $d
    cat > $d/strongswan.conf <<END
charon-systemd {
  load = random nonce openssl kdf aes sha1 sha2 hmac gcm kernel-netlink socket-default vici
  install_routes = no
  retransmit_timeout = 2.0
  ${charon_options}
  journal { default = -1 }
  filelog { log { path = $d/log
    default = ${loglevel:-1}
    flush_line = yes } }
  plugins { vici { socket = unix://$d/vici } }
}
swanctl {
  load = random nonce openssl
}
END
    (exec $ip netns exec $1 env STRONGSWAN_CONF=$d/strongswan.conf charon-systemd > $d/stdout 2>&1) &
    eval charon_$1=$!
    # The socket is there before anybody listens, and one that was killed leaves its own behind.
    until_true 20 load $1 || failed "charon of $1: $(cat $d/stdout /tmp/load-$1)"
}
load() { swan $1 --load-all --file /tmp/charon-$1/swanctl.conf > /tmp/load-$1 2>&1; }
swan() { n=$1; shift; ns $n env STRONGSWAN_CONF=/tmp/charon-$n/strongswan.conf swanctl "$@" --uri unix:///tmp/charon-$n/vici; }
# Captures what passes a netns' eth0, and lets awk have it as text: `tapped NETNS`.
capture() {
    echo "root:x:0:0::/:/bin/sh" > /etc/passwd; echo "root:x:0:" > /etc/group
    (exec $ip netns exec $1 tcpdump -Z root -i eth0 -s 96 -B 16384 -w /tmp/$1.pcap --immediate-mode > /tmp/$1.tcpdump 2>&1) &
    eval capture_$1=$!
    until_true 10 grep -q "listening on" /tmp/$1.tcpdump || failed "tcpdump: $(cat /tmp/$1.tcpdump)"
}
end_capture() {
    eval kill -INT \$capture_$1; eval wait \$capture_$1
    grep -q "^0 packets dropped by kernel" /tmp/$1.tcpdump || failed "the capture is not whole: $(cat /tmp/$1.tcpdump)"
}
tapped() { tcpdump -Z root -nn -r /tmp/$1.pcap 2> /dev/null; }
# Linux drops packets of its own while it swaps the SA on which it sends, and counts them: they never were on a wire.
unsent() { ns peer awk '/XfrmOut(StateInvalid|NoStates)/ { n += $2 } END { print n + 0 }' /proc/net/xfrm_stat; }
# Other counters of the peer's kernel, which only errors move.
xfrm_errors() { ns peer awk '$2 != 0 && !/XfrmOut(StateInvalid|NoStates)/ { print }' /proc/net/xfrm_stat; }
# Our SAs as the gateway lists them.
sas() { $esplanade sa list --socket $api; }

# A connection for a charon: netns, name, local, remote, children; `ike` holds further settings.
connection() {
    mkdir -p /tmp/charon-$1
    echo "connections { $2 { version = 2
  local_addrs = $3
  remote_addrs = $4
  proposals = aes128-sha256-curve25519
  mobike = ${mobike:-no}
  $ike
  local { auth = psk
    id = $3 }
  remote { auth = psk
    id = $4 }
  children { $5 } } }
secrets { ike-$2 { secret = correcthorse } }" >> /tmp/charon-$1/swanctl.conf
}
child() { # name, local_ts, remote_ts, esp, life
    echo "$1 { local_ts = $2
  remote_ts = $3
  esp_proposals = $4
  $5 }
"
}
