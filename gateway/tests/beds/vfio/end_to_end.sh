# In the guest: traffic through the gateway in every way that has to work.
frames=8192
vfio_options=
. /bin/site.sh
setup; start
reach "at the start"
grep "port open" /tmp/gateway.log | sed 's/.*port open/  port open/'
running_off_and_on() { for d in $lan_nic $wan_nic; do bus_master $d && failed "$d may still transfer $1"; done; true; }

echo "== flood, both families, both directions"
# Losses of the start are counted when traffic next comes by: a little of it, so that they are not taken for later ones.
ns lan $ping -q -c 4 -i 0.2 10.2.0.1 > /dev/null
mark before
# Echo requests for each family and size. The kernel drops echo replies of its own beyond some 130 KB, hence few large ones at once.
small=$((packets / 8)) large=$((small < 500 ? small : 500))
for size in 56 512; do flood $size $small 64; done
flood $((mtu - 200)) $large 4
mark after

echo "== idle: a sleeping worker, woken by interrupts"
before=$(cpu); sleep 3; used=$(($(cpu) - before))
echo "  CPU while idle: $used ticks of 300 in 3 s ($((used / 3)) %)"
[ $used -lt 60 ] || failed "an idle gateway takes $used of 300 ticks"
ns lan $ping -q -c 20 -i 0.1 10.2.0.1 > /tmp/idle || failed "pings into an idle gateway are lost"
echo "  from asleep, there and back through the gateway: $(grep rtt /tmp/idle)"

echo "== link flap"
echo "BED: monitor set_link dev2 off"; sleep 1
ns lan $ping -c 2 -i 0.2 -W 1 -q 10.2.0.1 > /dev/null && failed "pings cross a link that is down"
echo "BED: monitor set_link dev2 on"
reach "after the link came back"

echo "== reset by somebody else under load"
load
echo 1 > /sys/bus/pci/devices/$wan_nic/reset || failed "the kernel does not reset the device"
until_true 15 logged "running again" || failed "the gateway does not say that the device was reset"
reach "after a reset beneath the driver"
quiet

echo "== in order to its end, and again"
stop
running_off_and_on "after the end"
start; reach "after a restart"

echo "== kill -9 under load"
load
bus_master $lan_nic || failed "the NIC does not transfer"
seen=$(faults)
kill -9 $gateway; wait $gateway
running_off_and_on "after kill -9"
sleep 1; quiet
echo "  bus-master off on both NICs, $(($(faults) - seen)) DMA faults"
[ $(faults) = $seen ] || failed "DMA after kill -9"
keys 2; start; reach "after kill -9"

echo "== unbound under load"
load
echo $wan_nic > /sys/bus/pci/drivers/vfio-pci/unbind & taken=$!
until_true 10 logged "wants .* back" || failed "the gateway does not say that the device is wanted back"
[ -d /proc/$taken ] || failed "the device was taken away under a running gateway"
reach "while the system waits for the device"
stop; wait $taken; quiet
bus_master $wan_nic && failed "it may still transfer"
echo $wan_nic > /sys/bus/pci/drivers/vfio-pci/bind || failed "the device is not taken back"

echo "== unplugged under load"
start; reach "after another start"
load
echo "BED: monitor device_del dev2"
until_true 15 logged "wants .* back" || failed "the gateway does not say that the device is to be removed"
[ -d /proc/$gateway ] || failed "the gateway ended"
reach "while the system waits for the device"
stop; quiet
until_true 10 [ ! -e /sys/bus/pci/devices/$wan_nic ] || failed "the device is still there"
[ $(faults) = $seen ] || failed "DMA faults"
echo "PASSED"
