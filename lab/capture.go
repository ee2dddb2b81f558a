package lab

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// capture records what passes a link, in both directions, into a pcap file. It is
// the witness of the stories: it takes every packet, or says how many it missed.
type capture struct {
	path string
	file *os.File
	out  *bufio.Writer
	sock *os.File
	raw  int

	// mu is held by whoever looks into the capture; the recorder is then halted.
	mu     sync.Mutex
	missed uint32
	// halted is closed when the recorder has stopped reading; err is read after it.
	halted chan struct{}
	err    error
}

const (
	etherTypeAll = unix.ETH_P_ALL
	// A veth carries packets of up to 64 KiB that were never cut into segments.
	largestPacket = 128 << 10
	// receiveBuffer is what may wait while the recorder writes.
	receiveBuffer = 256 << 20
)

// startCapture records a link of a namespace.
func startCapture(path string, ns *netns.NS, link string) (*capture, error) {
	c := &capture{path: path}
	if err := ns.Do(func() error { return c.open(link) }); err != nil {
		return nil, fmt.Errorf("capture %s: %w", link, err)
	}
	c.sock = os.NewFile(uintptr(c.raw), "packets")
	var err error
	if c.file, err = os.Create(path); err != nil {
		c.sock.Close()
		return nil, err
	}
	c.out = bufio.NewWriterSize(c.file, 1<<20)
	header := make([]byte, 24)
	binary.LittleEndian.PutUint32(header, 0xa1b2c3d4)
	binary.LittleEndian.PutUint16(header[4:], 2)
	binary.LittleEndian.PutUint16(header[6:], 4)
	binary.LittleEndian.PutUint32(header[16:], largestPacket)
	binary.LittleEndian.PutUint32(header[20:], 1) // Ethernet
	if _, err := c.out.Write(header); err != nil {
		return nil, errors.Join(err, c.close())
	}
	c.resume()
	return c, nil
}

func (c *capture) open(link string) (err error) {
	dev, err := net.InterfaceByName(link)
	if err != nil {
		return err
	}
	protocol := uint16(etherTypeAll>>8 | etherTypeAll<<8&0xff00)
	c.raw, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(protocol))
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	err = unix.SetsockoptInt(c.raw, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	if errors.Is(err, unix.EPERM) { // in the lab of an ordinary user; the kernel takes as much as it allows
		err = unix.SetsockoptInt(c.raw, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	if err != nil {
		unix.Close(c.raw)
		return fmt.Errorf("receive buffer: %w", err)
	}
	if err := unix.Bind(c.raw, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: dev.Index}); err != nil {
		unix.Close(c.raw)
		return fmt.Errorf("bind to %s: %w", link, err)
	}
	return nil
}

// resume starts the recorder; halt ends it, and takes what still waits, so that
// everything that had been sent when halt was called is in the file.
func (c *capture) resume() {
	c.halted = make(chan struct{})
	go c.record()
}

func (c *capture) record() {
	defer close(c.halted)
	buf := make([]byte, largestPacket)
	for {
		n, err := c.sock.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err == nil {
			err = c.put(buf[:n])
		}
		if err != nil {
			c.err = err
			return
		}
	}
}

func (c *capture) halt() error {
	if err := c.sock.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	<-c.halted
	if c.err != nil {
		return c.err
	}
	buf := make([]byte, largestPacket)
	for {
		n, err := unix.Read(c.raw, buf)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err == nil {
			err = c.put(buf[:n])
		}
		if err != nil {
			return err
		}
	}
	stats, err := unix.GetsockoptTpacketStats(c.raw, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return err
	}
	c.missed += stats.Drops
	return errors.Join(c.out.Flush(), c.sock.SetReadDeadline(time.Time{}))
}

func (c *capture) put(packet []byte) error {
	var header [16]byte
	now := time.Now()
	binary.LittleEndian.PutUint32(header[:], uint32(now.Unix()))
	binary.LittleEndian.PutUint32(header[4:], uint32(now.Nanosecond()/1000))
	binary.LittleEndian.PutUint32(header[8:], uint32(len(packet)))
	binary.LittleEndian.PutUint32(header[12:], uint32(len(packet)))
	if _, err := c.out.Write(header[:]); err != nil {
		return err
	}
	_, err := c.out.Write(packet)
	return err
}

func (c *capture) close() error {
	return errors.Join(c.sock.Close(), c.file.Close())
}

// read shows every TCP segment recorded so far to see, in order. It fails if a
// packet was missed: what is not there may then have been there.
func (c *capture) read(see func(segment) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.halt(); err != nil {
		return fmt.Errorf("capture %s: %w", c.path, err)
	}
	defer c.resume()
	if c.missed > 0 {
		return fmt.Errorf("capture %s missed %d packets: it proves nothing", c.path, c.missed)
	}
	f, err := os.Open(c.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return readCapture(bufio.NewReaderSize(f, 1<<20), see)
}

// readCapture reads a pcap file.
func readCapture(r io.Reader, see func(segment) error) error {
	if _, err := io.CopyN(io.Discard, r, 24); err != nil {
		return err
	}
	var header [16]byte
	packet := make([]byte, largestPacket)
	for {
		if _, err := io.ReadFull(r, header[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		n := binary.LittleEndian.Uint32(header[8:])
		if n > largestPacket {
			return fmt.Errorf("a packet of %d bytes", n)
		}
		if _, err := io.ReadFull(r, packet[:n]); err != nil {
			return err
		}
		if s, ok := parseSegment(packet[:n]); ok {
			if err := see(s); err != nil {
				return err
			}
		}
	}
}

func doCapture(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(2, -1), call.done()); err != nil {
		return err
	}
	what, name, rest := call.words[0], call.words[1], call.words[2:]
	switch what {
	case "start":
		return c.beginCapture(name, rest)
	case "stop":
		return c.endCapture(name, call.stdout)
	}
	c.mu.Lock()
	recorded := c.captures[name]
	c.mu.Unlock()
	if recorded == nil {
		return fmt.Errorf("there is no capture %s", name)
	}
	check, err := c.captureCheck(what, rest)
	if err != nil {
		return err
	}
	if err := recorded.read(check.see); err != nil {
		return err
	}
	said, err := check.verdict()
	if call.not {
		if err == nil {
			return fmt.Errorf("capture %s %s: %s", what, strings.Join(rest, " "), said)
		}
		return nil
	}
	fmt.Fprintln(call.stdout, said)
	return err
}

// beginCapture records a node's uplink, or a pod's link at its node (NODE/POD).
func (c *Cluster) beginCapture(name string, rest []string) error {
	if len(rest) != 1 || !validName(name) {
		return usageError("capture start NAME NODE[/POD]")
	}
	nodeName, podName, ofPod := strings.Cut(rest[0], "/")
	n, err := c.node(nodeName)
	if err != nil {
		return err
	}
	link := uplinkName
	if ofPod {
		p, err := c.pod(podName)
		if err != nil {
			return err
		}
		link = p.link
	}
	started, err := startCapture(filepath.Join(c.dir, name+".pcap"), n.ns, link)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.captures[name] != nil {
		return errors.Join(fmt.Errorf("there is a capture %s already", name), started.close())
	}
	c.captures[name] = started
	return nil
}

func (c *Cluster) endCapture(name string, out io.Writer) error {
	c.mu.Lock()
	had := c.captures[name]
	delete(c.captures, name)
	c.mu.Unlock()
	if had == nil {
		return fmt.Errorf("there is no capture %s", name)
	}
	had.mu.Lock()
	defer had.mu.Unlock()
	err := errors.Join(had.halt(), had.close())
	fmt.Fprintln(out, filepath.Base(had.path))
	return err
}

// captureCheck makes the check of that name.
func (c *Cluster) captureCheck(what string, words []string) (captureCheck, error) {
	if what == "grep" && len(words) == 1 {
		return &grepCheck{text: []byte(words[0]), tails: map[flowKey][]byte{}}, nil
	}
	if len(words) < 2 {
		return nil, usageError("capture " + what)
	}
	between, err := c.between(words[0], words[1])
	if err != nil {
		return nil, err
	}
	switch {
	case what == "ports" && len(words) > 2:
		check := &portsCheck{between: between}
		for _, w := range words[2:] {
			port, err := strconv.ParseUint(w, 10, 16)
			if err != nil {
				return nil, err
			}
			check.ports = append(check.ports, uint16(port))
		}
		return check, nil
	case what == "count":
		return &countCheck{between: between}, nil
	case what == "tls":
		return &tlsCheck{between: between, first: map[flowKey]byte{}}, nil
	}
	return nil, usageError("capture " + what)
}
