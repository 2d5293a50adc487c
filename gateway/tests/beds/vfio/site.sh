# Runs in the guest (busybox sh), beside the gateway: $1 is the gateway, $2 packets to cross it in the load, $3 the MTU.
#
#   netns lan, eth0 ──hub 1── NIC 0 [gateway] NIC 1 ──hub 2── eth1, netns peer: the kernel's own ESP
#
# Everything that crosses the gateway is ESP on hub 2, IPv4 in IPv4 and IPv6 in IPv6. Every check that fails ends the script
# with the line "FAILED: …" and status 1. Lines "BED: monitor …" are commands for QEMU, which the host side carries out.
esplanade=$1 packets=$2 mtu=$3
lan_nic=${VFIO_DEVICES% *} wan_nic=${VFIO_DEVICES#* }
ip=/usr/bin/ip ping=/usr/bin/ping
failed() { echo "FAILED: $*"; tail -n 15 /tmp/gateway.log; dmesg | grep -i "DMAR.*fault\|vfio" | tail -n 5; exit 1; }
ns() { n=$1; shift; $ip netns exec $n "$@"; }
mac() { echo 52:54:00:00:$1; }

# --- The site -----------------------------------------------------------------------------------------------
# `udp=yes`: everything goes in ESP in UDP over IPv6. `workers=2`: two of them, and two tunnels for each family.
setup() {
    mkdir -p /run/netns /tmp/site
    # Room for all the jumbo replies of a flood, before ping has read them.
    for f in rmem_default rmem_max; do echo 8388608 > /proc/sys/net/core/$f; done
    # The kernel may still be looking at its NICs.
    until_true 10 [ -e /sys/class/net/eth0 -a -e /sys/class/net/eth1 ] || failed "the kernel has not found its NICs"
    for n in lan peer; do $ip netns add $n; ns $n $ip link set lo up; done
    $ip link set eth0 netns lan; $ip link set eth1 netns peer
    # The outer headers need room: the LAN's MTU is the path's.
    ns lan $ip link set eth0 mtu $((mtu - 100)) up; ns peer $ip link set eth1 mtu $mtu up
    for n in lan peer; do
        # No link-local chatter, no address detection: every packet is one of ours.
        for i in eth0 eth1; do ns $n sh -c "echo 0 > /proc/sys/net/ipv6/conf/$i/accept_dad" 2>/dev/null; done
    done
    ns lan $ip addr add 10.1.0.2/24 dev eth0; ns lan $ip addr add fd01::2/64 dev eth0 nodad
    ns peer $ip addr add 192.0.2.2/24 dev eth1; ns peer $ip addr add fd00::2/64 dev eth1 nodad
    ns peer $ip addr add 10.2.0.1/32 dev lo; ns peer $ip addr add fd02::1/128 dev lo nodad
    ns peer $ip addr add 10.2.128.1/32 dev lo; ns peer $ip addr add fd02:0:0:0:8000::1/128 dev lo nodad
    ns lan $ip route add 10.2.0.0/16 via 10.1.0.1; ns lan $ip -6 route add fd02::/64 via fd01::1
    ns peer $ip route add 10.1.0.0/24 via 192.0.2.1; ns peer $ip -6 route add fd01::/64 via fd00::1
    for a in 10.1.0.1 fd01::1; do ns lan $ip neigh add $a lladdr $(mac 01:01) dev eth0; done
    for a in 192.0.2.1 fd00::1; do ns peer $ip neigh add $a lladdr $(mac 01:02) dev eth1; done
    keys 1
    cat > /tmp/site/gateway.toml <<END
sa_files = ["sa.toml"]
[workers]
cpus = [$(seq -s , 0 $((${workers:-1} - 1)))]
[memory]
frames = $frames
# Does not divide a huge page: QEMU's igb and e1000e would drop a frame on two that are not neighbours in the guest's memory.
stride = $([ $mtu -gt 1500 ] && echo 10240 || echo 2048)
[[port]]
name = "lan"
kind = "vfio"
side = "inside"
mtu = $mtu
addresses = ["10.1.0.1/24", "fd01::1/64"]
vfio = { device = "$lan_nic", rx_ring = 512, tx_ring = 512$vfio_options }
[[port]]
name = "wan"
kind = "vfio"
side = "outside"
mtu = $mtu
addresses = ["192.0.2.1/24", "fd00::1/64"]
vfio = { device = "$wan_nic", rx_ring = 512, tx_ring = 512$vfio_options }
[[route]]
to = "10.2.0.0/16"
via = "192.0.2.2"
[[route]]
to = "fd02::/64"
via = "fd00::2"
[[neighbour]]
ip = "192.0.2.2"
mac = "$(mac 02:01)"
port = "wan"
[[neighbour]]
ip = "fd00::2"
mac = "$(mac 02:01)"
port = "wan"
[[neighbour]]
ip = "10.1.0.2"
mac = "$(mac 02:00)"
port = "lan"
[[neighbour]]
ip = "fd01::2"
mac = "$(mac 02:00)"
port = "lan"
[sas]
max = 64
[leases]
path = "leases"
[crypto]
provider = "aws-lc"
[api]
socket = "/tmp/api.sock"
[metrics]
enabled = false
END
}

# SAs of generation $1, a digit, in place of all before. After a crash the gateway refuses what its peer could have sent till
# then (ARCHITECTURE.md, leases): new keys are how a tunnel goes on at once.
keys() {
    rm -f /tmp/site/sa.toml
    ns peer $ip xfrm state flush; ns peer $ip xfrm policy flush
    if [ "$workers" ]; then
        tunnel $1 four 192.0.2.1 192.0.2.2 10.1.0.0/24 10.2.0.0/17 4
        tunnel $1 four-more 192.0.2.1 192.0.2.2 10.1.0.0/24 10.2.128.0/17 5
        tunnel $1 six fd00::1 fd00::2 fd01::/64 fd02::/65 6
        tunnel $1 six-more fd00::1 fd00::2 fd01::/64 fd02:0:0:0:8000::/65 7
        return
    fi
    if [ "$udp" ]; then
        tunnel $1 four fd00::1 fd00::2 10.1.0.0/24 10.2.0.0/16 4
    else
        tunnel $1 four 192.0.2.1 192.0.2.2 10.1.0.0/24 10.2.0.0/16 4
    fi
    tunnel $1 six fd00::1 fd00::2 fd01::/64 fd02::/64 6
}

# generation, name, our address, the peer's, our network, the peer's, a digit for the SPIs
tunnel() {
    out=$(hexdump -n 20 -v -e '/1 "%02x"' /dev/urandom) in=$(hexdump -n 20 -v -e '/1 "%02x"' /dev/urandom)
    (umask 077; cat >> /tmp/site/sa.toml <<END
[[tunnel]]
name = "$2"
local = "$3"
remote = "$4"
suite = "aes-128-gcm-16"
nat_t = $([ "$udp" ] && echo true || echo false)
[[tunnel.sa]]
direction = "out"
spi = 0x1$1$7
key = "$out"
first_use = true
[[tunnel.sa]]
direction = "in"
spi = 0x2$1$7
key = "$in"
first_use = true
[[policy]]
name = "$2-out"
direction = "out"
priority = 1
action = "protect"
tunnel = "$2"
src = "$5"
dst = "$6"
[[policy]]
name = "$2-in"
direction = "in"
priority = 1
action = "protect"
tunnel = "$2"
src = "$6"
dst = "$5"
END
)
    suite="mode tunnel flag af-unspec replay-window 128 aead rfc4106(gcm(aes))"
    behind=$([ "$udp" ] && echo "encap espinudp 4500 4500 ::")
    ns peer $ip xfrm state add src $3 dst $4 proto esp spi 0x1$1$7 reqid $7 $suite 0x$out 128 $behind || failed "kernel SA"
    ns peer $ip xfrm state add src $4 dst $3 proto esp spi 0x2$1$7 reqid $7 $suite 0x$in 128 $behind || failed "kernel SA"
    ns peer $ip xfrm policy add src $5 dst $6 dir in tmpl src $3 dst $4 proto esp reqid $7 mode tunnel
    ns peer $ip xfrm policy add src $6 dst $5 dir out tmpl src $4 dst $3 proto esp reqid $7 mode tunnel
}

# --- The gateway --------------------------------------------------------------------------------------------
start() {
    $esplanade run --config /tmp/site/gateway.toml > /tmp/gateway.log 2>&1 &
    gateway=$!
    for _ in $(seq 100); do
        $esplanade status --json --socket /tmp/api.sock 2>/dev/null | grep -q '"ready": true' && return
        [ -d /proc/$gateway ] || failed "the gateway did not start"
        usleep 200000
    done
    failed "the gateway is not ready"
}

# seconds, command: waits until it succeeds.
until_true() {
    for _ in $(seq $(($1 * 10))); do ( shift; "$@" ) && return; usleep 100000; done
    return 1
}
logged() { grep -qE "$1" /tmp/gateway.log; }

# In order; it fails when a frame is missing or the account does not balance.
stop() {
    kill $gateway; wait $gateway || failed "the gateway ended with $?"
    grep -q "every frame is accounted for" /tmp/gateway.log || failed "no account of frames"
    grep -qE "panic|mapping is kept|leaked" /tmp/gateway.log && failed "frames or mappings were lost"
    echo "  $(grep -o 'entered=.*' /tmp/gateway.log)"
}

# Until both families answer; some models take seconds for their link.
reach() {
    for _ in $(seq 40); do
        ns lan $ping -c 1 -W 1 -q 10.2.0.1 > /dev/null && ns lan $ping -c 1 -W 1 -q fd02::1 > /dev/null && return
    done
    failed "no answer through the tunnels: $1"
}

# Echo requests of $1 bytes, $2 for each family, both at once with $3 on their way. What is missing, the account shows.
flood() {
    size=$1 n=$2 window=$3
    ns lan $ping -f -q -l $window -c $n -s $size 10.2.0.1 > /tmp/four & a=$!
    ns lan $ping -f -q -l $window -c $n -s $size fd02::1 > /tmp/six & b=$!
    wait $a; wait $b
    for f in four six; do
        echo "  $f, $size bytes: $(grep received /tmp/$f | tr -d '\n')"
    done
}
# Load that lasts until `quiet`.
load() {
    ns lan $ping -f -q -l 16 -s 512 10.2.0.1 > /tmp/load4 & load4=$!
    ns lan $ping -f -q -l 16 -s 512 fd02::1 > /tmp/load6 & load6=$!
    sleep 1
}
# The shells in between ignore the signal, so it is sent to all pings of the guest.
quiet() { killall -INT ping; wait $load4 $load6; }

# All counters of now, for the account that the host side draws up between two marks.
mark() {
    before=
    # The gateway's are between two equal looks at the hosts'.
    while stats=$($esplanade stats --json --socket /tmp/api.sock | tr -d ' \n')
        now_lan=$(ns lan $ip -s -j link show eth0) now_peer=$(ns peer $ip -s -j link show eth1)
        [ "$now_lan $now_peer" != "$before" ]
    do
        before="$now_lan $now_peer"; sleep 1
    done
    echo "MARK $1 gateway $stats"
    echo "MARK $1 lan $now_lan"
    echo "MARK $1 peer $now_peer"
    ns peer $ip -s xfrm state list nokeys > /tmp/xfrm
    awk -v at="$1" '/spi 0x/ { spi = $4; sub(/\(.*/, "", spi) } / packets?\(s\)|\(packets\)/ && /^\t  [0-9]/ { split($2, n, "("); count = n[1] }
        /replay-window .* failed/ && spi != "" && /^\t  / { print "MARK " at " sa " spi " " count " " $2 " " $4 " " $6; spi = "" }' /tmp/xfrm
    uptime=$(cut -d' ' -f1 /proc/uptime); echo "MARK $1 time $uptime"
}

cpu() { set -- $(cat /proc/$gateway/stat); echo $(($14 + $15)); }
command_register() { hexdump -s 4 -n 2 -e '/2 "%u"' /sys/bus/pci/devices/$1/config; }
bus_master() { [ $(($(command_register $1) & 4)) -ne 0 ]; }
faults() { dmesg | grep -c "DMAR:.*fault addr"; }
