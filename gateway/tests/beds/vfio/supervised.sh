# In the guest: `no_iommu = true`. The IOMMU is there all the same, so that it would report a device that reaches what was freed;
# the supervisor does not know of it.
frames=8192
vfio_options=", no_iommu = true"
. /bin/site.sh
free_pages() { awk '/HugePages_Free/ { print $2 }' /proc/meminfo; }
worker() { awk -v p=$gateway '$4 == p { print $1 }' /proc/[0-9]*/stat 2>/dev/null; }
off() { for d in $lan_nic $wan_nic; do bus_master $d && return 1; done; true; }
all=$(free_pages)
setup; start; reach "at the start"
[ -n "$(worker)" ] || failed "there is no supervisor"
seen=$(faults)

echo "== in order to its end"
stop
off || failed "a NIC may still transfer after the end"
[ $(free_pages) = $all ] || failed "memory is still held"

echo "== the gateway is killed under load while its supervisor is held up"
start; reach "after a restart"
used=$(free_pages)
load
kill -STOP $gateway; kill -9 $(worker); sleep 1
# Memory and devices outlive their owner: the NICs go on receiving, into memory that nobody else was given.
[ $(free_pages) = $used ] || failed "packet memory was freed under the devices: $(free_pages) pages are free, $used before"
off && failed "the NICs have stopped by themselves: this proves nothing"
quiet
[ $(faults) = $seen ] || failed "DMA faults while the supervisor holds the memory"
kill -CONT $gateway; wait $gateway; status=$?
grep -o "stopped by the supervisor.*" /tmp/gateway.log
[ $status = 1 ] || failed "the supervisor ended with $status"
[ $(grep -c "stopped by the supervisor" /tmp/gateway.log) = 2 ] || failed "the supervisor did not stop both NICs"
off || failed "a NIC may still transfer"
[ $(free_pages) = $all ] || failed "memory is still held: $(free_pages) of $all pages are free"
[ $(faults) = $seen ] || failed "DMA faults"
keys 2; start; reach "after kill -9 of the gateway"

echo "== the supervisor is killed under load"
load
worker=$(worker)
kill -9 $gateway; wait $gateway
until_true 10 [ ! -d /proc/$worker ] || failed "the gateway goes on without a supervisor"
logged "the supervisor has died" || failed "the gateway does not say why it stops"
logged "every frame is accounted for" || failed "no account of frames"
quiet
off || failed "a NIC may still transfer"
[ $(faults) = $seen ] || failed "DMA faults"
[ $(free_pages) = $all ] || failed "memory is still held"
echo "PASSED"
