# In the guest: two workers with a queue of each NIC, four tunnels, every second one owned by each worker; at the end the WAN's NIC
# is pulled out under load.
frames=8192
vfio_options=
workers=2
. /bin/site.sh
targets="10.2.0.1 10.2.128.1 fd02::1 fd02:0:0:0:8000::1"
setup
start
for port in lan wan; do until_true 10 logged "port open port=$port .* queues=2" || failed "$port has not two queues"; done
# A link takes seconds with some models.
for target in $targets; do
    answered() { ns lan $ping -c 1 -W 1 -q $target > /dev/null; }
    until_true 40 answered || failed "no answer from $target"
done
ns lan $ping -q -c 4 -i 0.2 10.2.0.1 > /dev/null
mark before
for size in 56 1024; do
    pings=
    for target in $targets; do
        ns lan $ping -f -q -l 32 -c $((packets / 16)) -s $size $target > /tmp/to-$target & pings="$pings $!"
    done
    wait $pings
    for target in $targets; do echo "  $target, $size bytes: $(grep received /tmp/to-$target)"; done
done
mark after

echo "== idle: both workers asleep, woken by interrupts of both queues"
before=$(cpu); sleep 3; used=$(($(cpu) - before))
echo "  CPU while idle: $used ticks of 300 in 3 s"
[ $used -lt 60 ] || failed "an idle gateway takes $used of 300 ticks"
for target in $targets; do
    ns lan $ping -q -c 5 -i 0.1 $target > /tmp/idle || failed "pings into an idle gateway are lost"
    echo "  from asleep: $(grep rtt /tmp/idle)"
done

echo "== pulled out under load"
load
seen=$(faults)
received() { $esplanade stats --json --socket /tmp/api.sock | tr -d ' \n' | sed 's/.*"name":"lan"//; s/"name":"wan".*//' | grep -o '"rx_packets":[0-9]*' | cut -d: -f2 | awk '{ n += $1 } END { print n }'; }
# The slot's power goes: in its port's Slot Control, power and indicator off (PCI Express, 7.5.3.10). Nobody asks the driver.
port=/sys$(readlink -f /sys/bus/pci/devices/$wan_nic | sed 's|^/sys||; s|/[^/]*$||')/config
byte() { hexdump -s $1 -n 1 -e '/1 "%u"' $port; }
at=$(byte 52)
while [ $at -ne 0 -a $(byte $at) -ne 16 ]; do at=$(byte $((at + 1))); done
[ $at -ne 0 ] || failed "no slot"
old=$(byte $((at + 25)))
printf "\\$(printf %03o $((old | 7)))" | dd of=$port bs=1 seek=$((at + 25)) conv=notrunc 2> /dev/null
until_true 20 logged "(device error|needs a reset|restarts).*port=wan" || failed "the gateway does not say that the NIC does not work"
# QEMU tells the kernel with the attention button alone, which nobody has pushed: this is what the hot-plug driver does then.
echo 1 > /sys/bus/pci/devices/$wan_nic/remove &
until_true 20 logged "wants .* back" || failed "the gateway does not hear that the device is gone"
[ -d /proc/$gateway ] || failed "the gateway ended"
first=$(received); sleep 2
more=$(received)
echo "  frames of the other port meanwhile: $((more - first))"
[ $more -gt $first ] || failed "the other port stands still"
$esplanade ports --socket /tmp/api.sock
quiet
stop
until_true 10 [ ! -e /sys/bus/pci/devices/$wan_nic ] || failed "the device is still there"
[ $(faults) = $seen ] || failed "DMA faults"
grep -E "port=wan" /tmp/gateway.log | grep -E "WARN|ERROR" | cut -c29- | sort | uniq -c | sort -rn | head -5
echo "PASSED"
