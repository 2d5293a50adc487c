#!/usr/bin/perl
# A NAT for UDP 500 and 4500 in one direction: nat.pl INSIDE OUTSIDE SERVER. Each mapping is a port of its own on OUTSIDE; after
# SIGUSR1 there are new ones.
# No modules: the guest has the interpreter alone.
my ($inside, $outside, $server) = map { pack("C4", split /\./) } @ARGV;
sub bound {
    my ($address, $port) = @_;
    my $s;
    socket($s, 2, 2, 17) && bind($s, pack("SnA4x8", 2, $port, $address)) or die "socket: $!";
    return $s;
}
my (%in, %out, %host, $renew);
$in{$_} = bound($inside, $_) for 500, 4500;
sub map_anew { $out{$_} = bound($outside, 0) for 500, 4500 }
map_anew();
$SIG{USR1} = sub { $renew = 1 };
$| = 1; print "ready\n";
while (1) {
    if ($renew) { $renew = 0; map_anew(); print "mapped anew\n" }
    my $set = '';
    vec($set, fileno($_), 1) = 1 for values %in, values %out;
    next if select($set, undef, undef, 0.2) <= 0;
    for my $port (500, 4500) {
        if (vec($set, fileno($in{$port}), 1)) {
            $host{$port} = recv($in{$port}, my $p, 9000, 0);
            send($out{$port}, $p, 0, pack("SnA4x8", 2, $port, $server));
        }
        if (vec($set, fileno($out{$port}), 1)) {
            recv($out{$port}, my $p, 9000, 0);
            send($in{$port}, $p, 0, $host{$port}) if $host{$port};
        }
    }
}
