# In the guest: a program that owns two NICs panics under load ($1 is pmd/examples/panic_stops.rs, built for release: it aborts).
failed() { echo "FAILED: $*"; cat /tmp/out; exit 1; }
faults() { dmesg | grep -c "DMAR:.*fault addr"; }
seen=$(faults)
"$1" > /tmp/out 2>&1
status=$?
grep panic_stops /tmp/out
[ $status = 134 ] || failed "it ended with $status, not by SIGABRT"
for d in $VFIO_DEVICES; do
    grep -q "before: $d bus-master Some(1)" /tmp/out || failed "$d did not transfer before"
    grep -q "in the hook: $d bus-master Some(0)" /tmp/out || failed "$d still may transfer in the hook"
done
sleep 1
[ $(faults) = $seen ] || failed "DMA faults"
echo "PASSED"
