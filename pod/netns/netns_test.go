package netns

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

func unnamed(t *testing.T) *NS {
	t.Helper()
	ns, err := Unnamed()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func here(t *testing.T) Key {
	t.Helper()
	ns, err := Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	return ns.Key()
}

func TestDoIsInsideAndComesBack(t *testing.T) {
	ns, home := unnamed(t), here(t)
	if ns.Key() == home {
		t.Fatal("the new namespace is ours")
	}
	failure := errors.New("failure")
	for _, want := range []error{nil, failure} {
		err := ns.Do(func() error {
			if got := here(t); got != ns.Key() {
				t.Errorf("inside: namespace %d, want %d", got.Inode, ns.Inode())
			}
			return want
		})
		if !errors.Is(err, want) || (want == nil && err != nil) {
			t.Errorf("Do: %v, want %v", err, want)
		}
		if got := here(t); got != home {
			t.Errorf("after: namespace %d, want %d", got.Inode, home.Inode)
		}
	}
}

// However a function inside ends, no other goroutine ever runs on a thread that
// is in the wrong namespace.
func TestNoThreadIsLeftInside(t *testing.T) {
	ns, home := unnamed(t), here(t)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			ns.Do(func() error {
				if i%2 == 0 {
					runtime.Goexit()
				}
				return nil
			})
		})
		wg.Go(func() {
			if got := here(t); got != home {
				t.Errorf("a goroutine is in namespace %d", got.Inode)
			}
		})
	}
	wg.Wait()
	for _, k := range threads(t) {
		if k == ns.Key() {
			t.Error("a thread is still inside")
		}
	}
}

// threads are the namespaces of all threads, after those that die have died.
func threads(t *testing.T) (keys []Key) {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		ns, err := Open(task)
		if err != nil {
			continue // it has died
		}
		keys = append(keys, ns.Key())
		ns.Close()
	}
	return keys
}

func TestDoAfterClose(t *testing.T) {
	ns := unnamed(t)
	for range 2 {
		if err := ns.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := ns.Do(func() error { t.Error("was run"); return nil }); err == nil {
		t.Error("Do after Close succeeds")
	}
}

func TestNewIsFoundByItsPathUntilDeleted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods", "a")
	ns, err := New(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if !ns.Is(path) {
		t.Error("the path does not lead to the namespace")
	}
	if _, err := New(path); !errors.Is(err, os.ErrExist) {
		t.Errorf("New at a path that exists: %v", err)
	}
	for range 2 {
		if err := Delete(path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(path); !errors.Is(err, ErrGone) {
		t.Errorf("Open after Delete: %v, want ErrGone", err)
	}
}

func TestOpenRefusesWhatIsNoNamespace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/proc/self/ns/mnt", "/dev/null"} {
		if ns, err := Open(path); !errors.Is(err, ErrGone) {
			t.Errorf("Open(%s) = %v, %v, want ErrGone", path, ns, err)
		}
	}
}

func TestListenIsInside(t *testing.T) {
	ns := unnamed(t)
	for _, a := range []string{"127.0.0.1:7000", "[::1]:7000", "0.0.0.0:7001", "[::]:7001"} {
		at := netip.MustParseAddrPort(a)
		f, err := ns.Listen(at)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := ns.Listen(at); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("second Listen at %s: %v", at, err)
		}
		if err := ns.IsListener(f, at); err != nil {
			t.Error(err)
		}
		if err := unnamed(t).IsListener(f, at); err == nil {
			t.Errorf("listener at %s is taken for one of another namespace", at)
		}
		if err := ns.IsListener(f, netip.MustParseAddrPort("127.0.0.1:1")); err == nil {
			t.Errorf("listener at %s is taken for another", at)
		}
	}
}

// A socket stays where it was made: this is what the proxy relies on.
func TestSocketsDialFromInside(t *testing.T) {
	ns := unnamed(t)
	at := netip.MustParseAddrPort("127.0.0.1:7000")
	f, err := ns.Listen(at)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fds, err := ns.Sockets(SocketConfig{Family: 4, Count: 3, Mark: 0x7ac17})
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		defer unix.Close(fd)
		if mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK); err != nil || mark != 0x7ac17 {
			t.Errorf("mark %#x, %v", mark, err)
		}
		if on, err := unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT); err != nil || on != 1 {
			t.Errorf("transparent %d, %v", on, err)
		}
		if err := unix.Connect(fd, socket.Address(at)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.(*net.TCPListener).SetDeadline(time.Now().Add(5 * time.Second))
	for range fds {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

func TestSocketsAllOrNone(t *testing.T) {
	ns := unnamed(t)
	before, _ := os.ReadDir("/proc/self/fd")
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	low := unix.Rlimit{Cur: uint64(len(before)) + 20, Max: old.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	_, err := ns.Sockets(SocketConfig{Family: 6, Count: 64, Mark: 1})
	if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("Sockets: %v, want EMFILE", err)
	}
	if after, _ := os.ReadDir("/proc/self/fd"); len(after) > len(before) {
		t.Errorf("%d descriptors before, %d after", len(before), len(after))
	}
}

func TestBindForeign(t *testing.T) {
	ns := unnamed(t)
	if err := ns.Do(func() error {
		return exec.Command("sh", "-ec", "ip addr add 10.1.1.1/32 dev lo; ip -6 addr add fd11::1/128 dev lo").Run()
	}); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		source string
		want   bool
	}{
		{"10.9.9.9:20", true}, {"[fd99::9]:1023", true},
		{"10.9.9.9:1024", false}, {"10.9.9.9:0", false}, // takes no privilege
		{"10.1.1.1:20", false}, {"[fd11::1]:20", false}, {"127.0.0.1:20", false}, {"0.0.0.0:20", false}, {"[::]:20", false}, // the pod's own
		{"224.0.0.1:20", false}, {"[::ffff:10.1.1.1]:20", false},
	} {
		fd, err := ns.BindForeign(netip.MustParseAddrPort(r.source), 1)
		if (err == nil) != r.want {
			t.Errorf("%s: %v: want it bound: %v", r.source, err, r.want)
		}
		if err == nil {
			unix.Close(fd)
		}
	}
}

// TestEphemeralPorts: they are the namespace's, and none of the sockets is given one above LastPort.
func TestEphemeralPorts(t *testing.T) {
	ns := unnamed(t)
	if err := ns.Do(func() error { return os.WriteFile(ephemeralPorts, []byte("60990 61999"), 0) }); err != nil {
		t.Fatal(err)
	}
	if first, last, err := ns.EphemeralPorts(); err != nil || first != 60990 || last != 61999 {
		t.Errorf("%d to %d, %v: want 60990 to 61999", first, last, err)
	}
	fds, err := ns.Sockets(SocketConfig{Family: 4, Count: 10, Mark: 1, LastPort: 60999})
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		defer unix.Close(fd)
		// Nobody listens: the port is given all the same.
		unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		if at, err := unix.Getsockname(fd); err != nil || at.(*unix.SockaddrInet4).Port > 60999 {
			t.Errorf("%+v, %v: want no port above 60999", at, err)
		}
	}
}

func TestHasIPv6(t *testing.T) {
	ns := unnamed(t)
	if six, err := ns.HasIPv6(); err != nil || !six {
		t.Errorf("HasIPv6 = %v, %v", six, err)
	}
	err := ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	if six, err := ns.HasIPv6(); err != nil || six {
		t.Errorf("turned off: HasIPv6 = %v, %v", six, err)
	}
}
