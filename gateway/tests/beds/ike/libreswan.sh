# libreswan on the gateway's side: up by the first packet, rekeyed by time, deleted by the peer.
. /bin/site.sh
setup
never="rekey_time = 0"
connection peer c 192.0.2.2 192.0.2.1 "$(child c 10.2.0.0/24 10.1.0.0/24 aes128gcm16 "$never")"
home=/tmp/pluto
mkdir -p $home /var/lib/ipsec; : > /etc/hosts; : > /etc/resolv.conf
cp -r /bin/nss $home/nss
cat > $home/ipsec.conf <<END
config setup
	nssdir=$home/nss
	dumpdir=/tmp
conn c
	left=192.0.2.1
	leftsubnet=10.1.0.0/24
	leftupdown=%disabled
	right=192.0.2.2
	rightsubnet=10.2.0.0/24
	authby=secret
	ikev2=insist
	ike=aes128-sha2_256;dh31
	esp=aes_gcm128
	pfs=no
	salifetime=24s
	rekeymargin=16s
	rekeyfuzz=0%
	auto=ondemand
END
(umask 077; echo '192.0.2.1 192.0.2.2 : PSK "correcthorse"' > $home/ipsec.secrets)
lsw() { LD_LIBRARY_PATH=/opt/libreswan "$@"; }
pluto() { (LD_LIBRARY_PATH=/opt/libreswan exec $ip netns exec gw /usr/libexec/ipsec/pluto --nofork --config $home/ipsec.conf --secretsfile $home/ipsec.secrets --nssdir $home/nss --rundir $home --stderrlog > $home/log 2>&1) & pluto=$!; }
logs() { tail -n 40 $home/log; grep -v 'not measured' /tmp/gateway.log | tail -n ${1:-25}; }
gateway
charon peer
pluto
until_true 20 [ -S $home/pluto.ctl ] || failed "pluto does not start"
answers() { ns lan $ping -c 1 -W 1 -q 10.2.0.1; }
until_true 10 sh -c "$esplanade policy list --socket $api | grep -q ike:" || failed "the trap is not mirrored"
until_true 30 answers || failed "the first packet brings no tunnel up"
echo "  libreswan $(lsw /usr/libexec/ipsec/pluto --version | grep -o '[0-9][0-9.]*' | head -n 1): up by the first packet, $(sas | grep -c 0x) SAs"
line=$(ns lan $ping -q -i 0.01 -c 2800 -s 128 -W 3 10.2.0.1 | grep transmitted)
set -- $line
rekeys=$(grep -c "outbound CHILD_SA .* established" /tmp/charon-peer/log)
echo "  rekeyed by time: CHILD_SAs at the peer $rekeys; $line"
[ $rekeys -ge 3 ] || failed "too few rekeys"
[ $(($1 - $4)) = 0 ] || failed "$(($1 - $4)) packets lost; peer: $(xfrm_errors)"
[ "$($esplanade ike --json --socket $api | tr ',{}' '\n\n\n' | sed -n 's/.*"kernel_sent": *//p')" = 0 ] || failed "the kernel has sent"
swan peer --terminate --ike c > /dev/null
until_true 30 answers || failed "deleted by the peer: it does not come up again"
echo "  deleted by the peer and up again by a packet"
[ -z "$(xfrm_errors | grep -v NoStates)" ] || failed "the peer's kernel counts $(xfrm_errors)"
kill $pluto
stop
echo PASSED
