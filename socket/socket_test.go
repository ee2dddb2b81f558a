package socket

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAddressThereAndBack(t *testing.T) {
	for _, s := range []string{"10.0.0.1:80", "[fd00::1]:65535", "[::ffff:10.0.0.1]:1", "0.0.0.0:0", "[fe80::1%7]:80"} {
		want := netip.MustParseAddrPort(s)
		if got := AddrPort(Address(want)); got != want {
			t.Errorf("%s came back as %s", want, got)
		}
	}
	if got := AddrPort(&unix.SockaddrUnix{Name: "x"}); got != (netip.AddrPort{}) {
		t.Errorf("a unix socket's address is %s", got)
	}
}
