# Tunnels that are interfaces of the kernel's, news that come faster than they are read, and a peer that moves (MOBIKE). The routes and
# neighbours are the kernel's.
. /bin/site.sh
kernel_tables="[kernel]
routes = true
neighbours = true
addresses = true"
ike_options="receive_buffer = 4096"
setup
never="rekey_time = 0"
interface="$never
 if_id_in = 42
 if_id_out = 42"
connection gw road 192.0.2.1 192.0.2.2 "$(child road 0.0.0.0/0 0.0.0.0/0 aes128gcm16 "$interface")$(child late 10.1.0.0/24 10.2.4.0/24 aes256gcm16 "$never")"
connection peer road 192.0.2.2 192.0.2.1 "$(child road 0.0.0.0/0 0.0.0.0/0 aes128gcm16 "$never
 if_id_in = 43
 if_id_out = 43")$(child late 10.2.4.0/24 10.1.0.0/24 aes256gcm16 "$never")"
mobike=yes
connection gw moving 192.0.2.1 %any "$(child moving 10.1.0.0/24 10.2.3.0/24 aes128gcm16 "$never")"
connection peer moving %any 192.0.2.1 "$(child moving 10.2.3.0/24 10.1.0.0/24 aes128gcm16 "$never")"
for n in gw peer; do sed -i 's/id = %any/id = moving.peer/' /tmp/charon-$n/swanctl.conf; done
gateway
charon peer; charon gw
answers() { ns lan $ping -c 1 -W 1 -q $1; }
initiate() { swan $1 --initiate --child $2 > /tmp/initiate 2>&1 || failed "initiate $2: $(cat /tmp/initiate)"; }

ns gw $ip link add ipsec0 type xfrm dev wan0 if_id 42 && ns gw $ip link set ipsec0 up || failed "xfrm interface"
ns gw $ip route add 10.2.5.0/24 dev ipsec0
ns peer $ip link add ipsec0 type xfrm dev eth0 if_id 43 && ns peer $ip link set ipsec0 up || failed "xfrm interface"
ns peer $ip route add 10.1.0.0/24 dev ipsec0 metric 5
initiate gw road
until_true 10 answers 10.2.5.1 || failed "no answer by the tunnel's route: $(ns gw $ip route)"
encrypted=$(stat_of encrypted)
lost=$(ns lan $ping -q -c 100 -i 0.02 -W 2 10.2.5.1 | awk '/transmitted/ { print $1 - $4 }')
[ "$lost" = 0 ] || failed "$lost packets lost by the tunnel's route"
[ $(($(stat_of encrypted) - encrypted)) = 100 ] || failed "not all went through the tunnel"
ns gw $ip route del 10.2.5.0/24 dev ipsec0
sleep 1
encrypted=$(stat_of encrypted)
answers 10.2.5.1 && failed "an answer without a route into the tunnel"
[ "$(stat_of encrypted)" = $encrypted ] || failed "encrypted without a route"
ns peer $ip route del 10.1.0.0/24 dev ipsec0
echo "  xfrm interface: 100 packets by the kernel's route into the tunnel, none after the route is gone"

resyncs() { $esplanade ike --json --socket $api | tr ',{}' '\n\n\n' | sed -n 's/.*"resyncs": *//p'; }
before=$(resyncs)
kill -STOP $gateway
for i in $(seq 100 299); do
    echo "xfrm state add src 198.51.100.1 dst 198.51.100.2 proto esp spi 0x$i mode tunnel aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128"
done > /tmp/many
ns gw $ip -batch /tmp/many || failed "the kernel's SAs"
initiate gw late
for i in $(seq 100 299); do echo "xfrm state del src 198.51.100.1 dst 198.51.100.2 proto esp spi 0x$i"; done > /tmp/many
ns gw $ip -batch /tmp/many || failed "the kernel's SAs"
kill -CONT $gateway
until_true 10 answers 10.2.4.1 || failed "the tunnel made meanwhile is not taken"
[ $(resyncs) -gt $before ] || failed "nothing was lost, so nothing was tried"
sas | grep -q 198.51.100 && failed "SAs that are gone are still there"
echo "  news lost: read anew $(($(resyncs) - before)) times, the tunnel made meanwhile is up"

ns peer sh -c "echo 1 > /proc/sys/net/ipv4/conf/all/promote_secondaries; echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries"
initiate peer moving
until_true 10 answers 10.2.3.1 || failed "no answer from the peer that will move"
ns peer $ip addr add 192.0.2.3/24 dev eth0
ns peer $ip addr del 192.0.2.2/24 dev eth0
moved() { sas | grep -q "192.0.2.3"; }
until_true 30 moved || failed "the SAs have not moved"
until_true 10 answers 10.2.3.1 || failed "no answer from the peer that moved"
lost=$(ns lan $ping -q -c 100 -i 0.02 -W 2 10.2.3.1 | awk '/transmitted/ { print $1 - $4 }')
[ "$lost" = 0 ] || failed "$lost packets lost after the move"
echo "  moved: the same keys at another address, replays at the peer $(ns peer awk '/XfrmInStateSeqError/ { print $2 }' /proc/net/xfrm_stat)"
[ "$(ns peer awk '/XfrmInStateSeqError/ { print $2 }' /proc/net/xfrm_stat)" = 0 ] || failed "numbers were used twice"
[ "$($esplanade ike --json --socket $api | tr ',{}' '\n\n\n' | sed -n 's/.*"kernel_sent": *//p')" = 0 ] || failed "the kernel has sent"
stop
echo PASSED
