# $2 tunnels brought up and each rekeyed by packets, under load that crosses all of them.
. /bin/site.sh
tunnels=$2
setup
never="rekey_time = 0"
few="rekey_time = 0
 rekey_packets = 30
 rand_packets = 10
 life_packets = 600
 start_action = start"
ours= theirs=
for n in $(seq $tunnels); do
    a=$((n / 250)) b=$((n % 250 + 1))
    ours="$ours$(child t$n 10.1.0.0/24 10.2.$((10 + a)).$b/32 aes128gcm16 "$few")
"
    theirs="$theirs$(child t$n 10.2.$((10 + a)).$b/32 10.1.0.0/24 aes128gcm16 "$never")
"
    echo 10.2.$((10 + a)).$b
done > /tmp/targets
sed 's/.*/addr add &\/32 dev lo/' /tmp/targets | ns peer $ip -batch -
connection gw c 192.0.2.1 192.0.2.2 "$ours"; connection peer c 192.0.2.2 192.0.2.1 "$theirs"
gateway
charon peer; charon gw
began=$(cut -d. -f1 /proc/uptime)
up() { [ "$(sas | grep -c 'out  0x')" -ge $tunnels ]; }
until_true $((60 + tunnels)) up || failed "SAs are missing: $(sas | grep -c 'out  0x')"
echo "  $tunnels tunnels up in $(($(cut -d. -f1 /proc/uptime) - began)) s: $($esplanade ike --socket $api | head -n 1)"
# Some forty packets for each: every tunnel passes its limit.
rate=400
ns lan perl /bin/flood.pl 10.1.0.2 $((tunnels * 45 / rate + 2)) $rate < /tmp/targets > /tmp/flood 2>&1
rekeys() { $esplanade stats --socket $api | awk '/^ike:/ { n += $NF } END { print n }'; }
all() { [ $(rekeys) -ge $tunnels ]; }
# One daemon, one IKE SA: they are negotiated one after the other.
until_true $((60 + tunnels / 5)) all
rekeys=$(rekeys)
# The gateway's drops, a reason and its number a line.
drops() {
    $esplanade stats --json --socket $api | tr -d ' \n' | sed -n 's/.*"drops":\[\([^]]*\)\].*/\1/p' | tr '{}' '\n\n' |
        awk -F'[:,"]+' '/reason/ { for (i = 1; i < NF; i++) { if ($i == "reason") r = $(i + 1); if ($i == "frames") f = $(i + 1) } print r, f }'
}
$esplanade stats --json --socket $api | grep -q '"drops":' || failed "stats names no drops"
unknown=$(drops | awk '$1 == "sa_not_found" { print $2 }')
echo "  $rekeys rekeys; echoes: $(cat /tmp/flood), $(unsent) never sent by the peer; dropped by the gateway: $(drops | tr '\n' ',')"
set -- $(cat /tmp/flood)
[ "$1" -gt $((tunnels * 40)) ] && [ "$1" = $(($3 + $(unsent))) ] && [ "$5" = 0 ] || failed "packets are lost, or came twice: $*"
[ "${unknown:-0}" = 0 ] || failed "$unknown packets found no SA in the gateway"
[ $rekeys -ge $tunnels ] || failed "only $rekeys rekeys"
[ -z "$(xfrm_errors)" ] || failed "the peer's kernel counts $(xfrm_errors)"
stop
echo PASSED
