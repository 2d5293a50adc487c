#!/usr/bin/perl
# Echo requests from one address to many, in turn: flood.pl FROM SECONDS PACKETS-A-SECOND < targets
# Prints what was sent, what came back, and what came back twice.
# No modules: the guest has the interpreter alone.
my ($from, $seconds, $rate) = @ARGV;
my @targets = map { chomp; pack("C4", split /\./) } <STDIN>;
socket(my $s, 2, 3, 1) or die "socket: $!";
setsockopt($s, 1, 8, pack("i", 8 << 20));
my $id = $$ & 0xffff;
my %out;
my ($sent, $got, $twice) = (0, 0, 0);
sub sum { my $t = unpack("%32n*", $_[0]); $t = ($t >> 16) + ($t & 0xffff) while $t >> 16; return ~$t & 0xffff }
sub now { open(my $u, "<", "/proc/uptime"); return (split ' ', <$u>)[0] }
sub hear {
    my ($wait) = @_;
    my $set = ''; vec($set, fileno($s), 1) = 1;
    while (select(my $r = $set, undef, undef, $wait) > 0) {
        $wait = 0;
        recv($s, my $p, 2000, 0) // next;
        my $head = (ord(substr $p, 0, 1) & 15) * 4;
        my ($type, undef, undef, $i, undef, $n) = unpack("CCnnnN", substr $p, $head);
        next if $type != 0 || $i != $id || $n > $sent;
        if ($out{$n}) { delete $out{$n}; $got++ } else { $twice++ }
    }
}
my ($start, $n) = (now(), 0);
while ((my $t = now() - $start) < $seconds) {
    for (; $sent < $t * $rate; ) {
        my $target = $targets[$n++ % @targets];
        $out{++$sent} = 1;
        my $body = pack("nnN", $id, $sent & 0xffff, $sent) . "x" x 120;
        my $sum = sum(pack("CCn", 8, 0, 0) . $body);
        send($s, pack("CCn", 8, 0, $sum) . $body, 0, pack("SnA4x8", 2, 0, $target)) or die "send: $!";
        hear(0) unless $sent % 8;
    }
    hear(0.005);
}
my $end = now() + 8;
hear(0.1) while %out && now() < $end;
print "$sent sent, $got back, $twice twice\n";
