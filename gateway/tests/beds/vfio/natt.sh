# In the guest: ESP in UDP over IPv6, whose checksums the NIC makes and the kernel verifies.
frames=8192
vfio_options=
udp=yes
. /bin/site.sh
csum_seen() { [ "$(counted Udp6InCsumErrors)" = 1 ]; }
# A counter of IPv6 in the peer's namespace.
counted() { ns peer awk -v n=$1 '$1 == n { print $2 }' /proc/net/snmp6; }

setup
# The kernel wants a socket for encapsulated packets (UDP_ENCAP: ESP in UDP). Address family 10, port 4500, any address.
ns peer perl -e '$| = 1; socket(S, 10, 2, 17) && setsockopt(S, 17, 100, pack("i", 2))
    && bind(S, pack("S n N a16 L", 10, 4500, 0, "", 0)) && print "socket\n" or die $!; sleep' > /tmp/socket 2>&1 &
socket=$!
until_true 10 grep -q "\S" /tmp/socket; grep -q "^socket" /tmp/socket || failed "$(cat /tmp/socket)"
start
until_true 10 logged "port=wan .*udp_checksums=true" || failed "the NIC does not make checksums"
reach "at the start"
ns lan $ping -q -c 4 -i 0.2 10.2.0.1 > /dev/null
mark before
for size in 0 1 56 513 1401; do flood $size $((packets / 20)) 32; done
flood $((mtu - 200)) $((packets / 20)) 4
mark after

echo "== the device is reset, and has to be told again where checksums lie"
# Power management, which comes first where a device has it, changes nothing in QEMU's models.
grep -q "^pm bus" /sys/bus/pci/devices/$wan_nic/reset_method && echo bus > /sys/bus/pci/devices/$wan_nic/reset_method
# Whether it did shows in the gateway's log: over the bus, the kernel says that it cannot, and does.
echo 1 2> /dev/null > /sys/bus/pci/devices/$wan_nic/reset
for _ in $(seq 20); do ns lan $ping -c 1 -W 1 -q 10.2.0.1 > /dev/null; logged "running again" && break; done
until_true 10 logged "running again" || failed "the gateway does not say that the device was reset"
reach "after a reset beneath the driver"
stop
echo "  UDP packets that the peer's kernel took: $(counted Udp6InDatagrams), refused: $(counted Udp6InErrors), for their checksum: $(counted Udp6InCsumErrors)"
[ $(counted Udp6InCsumErrors) = 0 ] || failed "wrong checksums"

# What was just counted can be other than 0: a datagram with a wrong checksum.
ns peer perl -e 'socket(R, 10, 3, 17) && send(R, pack("nnnn", 4500, 4500, 16, 0x1234) . "x" x 8, 0,
    pack("S n N a16 L", 10, 0, 0, pack("H32", "fd000000000000000000000000000002"), 0)) or die $!' || failed "perl"
until_true 5 csum_seen || failed "the kernel does not look at checksums"
kill $socket
echo "PASSED"
