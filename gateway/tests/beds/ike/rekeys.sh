# $2 rekeys, $3 packets a second, by packets, bytes and time. Captures of both wires must show each request and each answer once on
# either side, and no number of an SA twice.
. /bin/site.sh
rekeys=$2 pps=$3 delay=$4
setup
every=$((pps / 4))
never="rekey_time = 0"
by_packets="rekey_time = 0
 rekey_packets = $every
 rand_packets = 0
 life_packets = $((every * 20))"
by_bytes="rekey_time = 0
 rekey_bytes = $((every * 200))
 rand_bytes = 0
 life_bytes = $((every * 4000))"
by_time="rekey_time = 2s
 life_time = 60s
 rand_time = 0"
connection gw c 192.0.2.1 192.0.2.2 \
    "$(child packets 10.1.0.0/24 10.2.0.0/24 aes128gcm16 "$by_packets")$(child bytes 10.1.0.0/24 10.2.1.0/24 aes256-sha256 "$by_bytes")$(child time 10.1.0.0/24 10.2.2.0/24 aes128gcm16-esn "$by_time")$(child six fd01::/64 fd02::/64 aes256gcm16 "$by_packets")"
connection peer c 192.0.2.2 192.0.2.1 \
    "$(child packets 10.2.0.0/24 10.1.0.0/24 aes128gcm16 "$never")$(child bytes 10.2.1.0/24 10.1.0.0/24 aes256-sha256 "$never")$(child time 10.2.2.0/24 10.1.0.0/24 aes128gcm16-esn "$never")$(child six fd02::/64 fd01::/64 aes256gcm16 "$never")"
gateway
charon peer; charon gw
for c in packets bytes time six; do
    swan gw --initiate --child $c > /tmp/initiate 2>&1 || failed "initiate $c: $(cat /tmp/initiate)"
done
sas
for a in 10.2.0.1 10.2.1.1 10.2.2.1 fd02::1; do
    until_true 10 ns lan $ping -c 1 -W 1 -q $a || failed "no answer from $a"
done
echo "  up; loading"
capture lan; capture peer
interval=$(awk -v p=$pps 'BEGIN { print 1 / p }')
done_rekeys() { grep -c "outbound CHILD_SA .*{[0-9]*} established" /tmp/charon-gw/log; }
before=$(done_rekeys)
i=0
seconds=$((rekeys / 8 + 4))
for a in 10.2.0.1 10.2.1.1 10.2.2.1 fd02::1; do
    ns lan $ping -q -i $interval -c $((pps * seconds)) -s 128 -W 3 $a > /tmp/ping$i & i=$((i + 1))
    pings="$pings $!"
done
wait $pings
now=$(done_rekeys)
echo "  rekeys: $((now - before))"
lost=0
for i in 0 1 2 3; do
    line=$(grep transmitted /tmp/ping$i); echo "  $line"
    set -- $line
    lost=$((lost + $1 - $4))
done
[ $((now - before)) -ge $rekeys ] || failed "only $((now - before)) rekeys"
unsent=$(unsent)
[ $lost = $unsent ] || failed "$lost packets lost; peer: $(xfrm_errors); $($esplanade stats --socket $api | grep -v ' 0$')"
[ -z "$(xfrm_errors)" ] || failed "the peer's kernel counts $(xfrm_errors)"
end_capture lan; end_capture peer
# Each echo by its far end, identity and number: once there, once back.
tapped lan | awk '/ICMP6?,? echo (request|reply)/ {
        key = $0; sub(/.*id /, "", key); sub(/, length.*/, "", key)
        far = $5; sub(/:$/, "", far)
        if (/echo request/) asked[far " " key]++; else answered[$3 " " key]++
    }
    END {
        for (k in asked) { sent++; if (asked[k] != 1) again++; if (answered[k] > 0) back++; if (answered[k] > 1) again++ }
        print sent + 0, back + 0, again + 0
    }' > /tmp/on_lan
tapped peer | awk '/ESP\(spi=/ {
        from = $3; match($0, /spi=0x[0-9a-f]+,seq=0x[0-9a-f]+/); number = substr($0, RSTART, RLENGTH)
        if (seen[number]++) again++
        spi = number; sub(/,.*/, "", spi); if (!known[spi]++) sas++
        if (from == "192.0.2.1" || from == "fd00::1") there++; else back++
    }
    END { print there + 0, back + 0, again + 0, sas + 0 }' > /tmp/on_wan
read sent answered twice < /tmp/on_lan; read there back numbers_twice seen < /tmp/on_wan
echo "  captured: LAN $sent echoes, $answered answers, $twice twice; WAN $there ESP there, $back back, $seen SAs, $numbers_twice numbers twice; $unsent never sent by the peer"
[ $sent -gt 0 ] && [ $sent = $there ] && [ $answered = $back ] || failed "sent - received is not 0"
[ $((sent - answered)) = $unsent ] && [ $twice = 0 ] && [ $numbers_twice = 0 ] || failed "the captures show loss or repeats"
# The kernel never sent with an SA of ours.
$esplanade ike --socket $api || failed "esplanade ike"
stop
echo PASSED
