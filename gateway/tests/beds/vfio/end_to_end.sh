# In the guest: traffic through the gateway in every way that has to work.
. /bin/site.sh
setup; start
reach "at the start"
grep "port open" /tmp/gateway.log | sed 's/.*port open/  port open/'

echo "== flood, both families, both directions"
for size in 56 512 $((mtu - 200)); do flood $size $((echoes / 3)); done
# A replay or a wrong key would show here.
ns peer $ip -s xfrm state | grep -E "failed:" -A1 | grep -E "replay-window 0 replay 0 failed 0|^--" -v | grep failed && failed "the kernel refused packets"

echo "== idle: a sleeping worker, woken by interrupts"
sleep 1; before=$(cpu); sleep 5; used=$(($(cpu) - before))
echo "  CPU while idle: $used ticks of 500 in 5 s ($((used / 5)) %)"
[ $used -lt 100 ] || failed "an idle gateway takes $used of 500 ticks"
ns lan $ping -q -c 20 -i 0.2 10.2.0.1 > /tmp/idle || failed "pings into an idle gateway are lost"
echo "  from asleep, there and back through the gateway: $(grep rtt /tmp/idle)"

echo "== link flap"
echo "BED: monitor set_link vn2 off"; sleep 2
ns lan $ping -c 2 -W 1 -q 10.2.0.1 > /dev/null && failed "pings cross a link that is down"
echo "BED: monitor set_link vn2 on"
reach "after the link came back"

echo "== in order to its end, and again"
stop
for d in $lan_nic $wan_nic; do bus_master $d && failed "$d may still transfer"; done
start; reach "after a restart"

echo "== kill -9 under load"
ns lan $ping -f -q -c 100000 10.2.0.1 > /dev/null & load=$!
sleep 1; bus_master $lan_nic || failed "the NIC does not transfer"
seen=$(faults)
kill -9 $gateway; wait $gateway
for d in $lan_nic $wan_nic; do bus_master $d && failed "$d may still transfer after kill -9"; done
sleep 1; kill $load
echo "  bus-master off on both NICs, $(($(faults) - seen)) DMA faults"
[ $(faults) = $seen ] || failed "DMA after kill -9"
start; reach "after kill -9"

echo "== unbound under load"
ns lan $ping -f -q -c 100000 10.2.0.1 > /dev/null & load=$!
sleep 1
echo $wan_nic > /sys/bus/pci/drivers/vfio-pci/unbind & taken=$!
sleep 2
grep -q "wants .* back" /tmp/gateway.log || failed "the gateway does not say that the device is wanted back"
[ -e /sys/bus/pci/devices/$wan_nic/driver ] || failed "the device was taken away under a running gateway"
stop; wait $taken
[ -e /sys/bus/pci/devices/$wan_nic/driver ] && failed "the device was not released"
kill $load
echo "PASSED"
