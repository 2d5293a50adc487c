# A peer behind a NAT that forgets its mapping: the gateway follows without a word of IKE from the peer.
#
#   netns lan ── [netns gw] ── wan0 ── eth0 [netns nat: nat.pl] eth1 ── eth0 [netns peer]
. /bin/site.sh
tap='tap = "wan0t"'
setup
$ip netns add nat; ns nat $ip link set lo up
# The peer's end of the cable goes to the NAT, and the peer gets another one.
ns peer $ip link set eth0 netns nat
ns nat $ip link set eth0 up; ns nat $ip addr add 192.0.2.2/24 dev eth0
cable nat eth1 peer eth0
ns nat $ip addr add 10.9.0.1/24 dev eth1; ns peer $ip addr add 10.9.0.2/24 dev eth0
ns peer $ip route add 10.1.0.0/16 via 10.9.0.1
never="rekey_time = 0"
ike="dpd_delay = 0
  send_cert = never"
connection gw c 192.0.2.1 %any "$(child c 10.1.0.0/24 10.2.0.0/24 aes128gcm16 "$never")"
sed -i 's/id = %any/id = 10.9.0.2/' /tmp/charon-gw/swanctl.conf
connection peer c 10.9.0.2 10.9.0.1 "$(child c 10.2.0.0/24 10.1.0.0/24 aes128gcm16 "$never")"
sed -i 's/id = 10.9.0.1/id = 192.0.2.1/' /tmp/charon-peer/swanctl.conf
gateway
charon gw; charon peer
(exec $ip netns exec nat perl /bin/nat.pl 10.9.0.1 192.0.2.2 192.0.2.1 > /tmp/nat 2>&1) &
nat=$!
until_true 10 grep -q ready /tmp/nat || failed "$(cat /tmp/nat)"
swan peer --initiate --child c > /tmp/initiate 2>&1 || failed "initiate: $(cat /tmp/initiate)"
answers() { ns peer $ping -c 1 -W 1 -q -I 10.2.0.1 10.1.0.2; }
until_true 10 answers || failed "no answer through the NAT"
port() { ns gw $ip xfrm state list nokeys | awk '/^src 192.0.2.1/ { out = 1 } /^src 192.0.2.2/ { out = 0 } out && /encap/ { for (i = 1; i < NF; i++) if ($i == "dport") print $(i + 1) }'; }
before=$(port)
echo "  up through a NAT, port $before"
kill -USR1 $nat
until_true 5 grep -q anew /tmp/nat || failed "no new mapping"
answers && failed "the old mapping still works"
until_true 15 answers || failed "the gateway does not follow: $($esplanade events --socket $api | tail -n 5)"
after=$(port)
[ "$before" != "$after" ] || failed "the daemon has not moved its SAs"
$esplanade events --socket $api | grep mapping_change || failed "no event"
echo "  the NAT has another mapping, port $after: followed, $(sas | grep -c 0x) SAs"
lost=$(ns peer $ping -q -c 100 -i 0.02 -W 2 -I 10.2.0.1 10.1.0.2 | awk '/transmitted/ { print $1 - $4 }')
[ "$lost" = 0 ] || failed "$lost packets lost after it"
[ "$($esplanade ike --json --socket $api | tr ',{}' '\n\n\n' | sed -n 's/.*"kernel_sent": *//p')" = 0 ] || failed "the kernel has sent"
kill $nat
stop
echo PASSED
