package lab

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
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
	ring *ring
	file *os.File

	// mu is held by whoever looks into the capture.
	mu sync.Mutex
	// flushed takes the outcome when the recorder has met the ring's mark: all that
	// had passed before is in the file. It has room for one.
	flushed chan error
}

// largestPacket is more than a veth carries: packets of up to 64 KiB that were never
// cut into segments.
const largestPacket = 128 << 10

// startCapture records a link of a namespace, or all links but lo if link is "".
func startCapture(path string, ns *netns.NS, link string) (c *capture, err error) {
	c = &capture{path: path, flushed: make(chan error, 1)}
	if err := ns.Do(func() (err error) { c.ring, err = openRing(link); return err }); err != nil {
		return nil, fmt.Errorf("capture %s: %w", link, err)
	}
	if c.file, err = os.Create(path); err != nil {
		return nil, errors.Join(err, c.ring.close())
	}
	header := make([]byte, 24)
	binary.LittleEndian.PutUint32(header, 0xa1b2c3d4)
	binary.LittleEndian.PutUint16(header[4:], 2)
	binary.LittleEndian.PutUint16(header[6:], 4)
	binary.LittleEndian.PutUint32(header[16:], largestPacket)
	binary.LittleEndian.PutUint32(header[20:], 1) // Ethernet
	if _, err := c.file.Write(header); err != nil {
		return nil, errors.Join(err, c.ring.close(), c.file.Close())
	}
	go c.record()
	return c, nil
}

// record ends when the ring is closed, which close waits for.
func (c *capture) record() {
	defer close(c.flushed)
	err := c.ring.read(func(packets [][]byte, marks int) error {
		err := c.put(packets)
		for range marks {
			c.flushed <- err
		}
		return err
	})
	if err != nil {
		c.flushed <- err
	}
}

// flush returns when all that had passed before is in the file.
func (c *capture) flush() error {
	if err := c.ring.mark(); err != nil {
		return err
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case err, ok := <-c.flushed:
		if !ok {
			return errors.New("the recorder has ended")
		}
		return err
	case <-timer.C:
		return errors.New("the recorder does not come to an end")
	}
}

// put writes packets from where they are: a copy of each would cost as much as
// sending it did, and the ring would run full.
func (c *capture) put(packets [][]byte) error {
	now := time.Now()
	heads := make([]byte, 16*len(packets))
	pieces := make([][]byte, 0, 2*len(packets))
	for i, packet := range packets {
		head := heads[16*i : 16*i+16]
		binary.LittleEndian.PutUint32(head, uint32(now.Unix()))
		binary.LittleEndian.PutUint32(head[4:], uint32(now.Nanosecond()/1000))
		binary.LittleEndian.PutUint32(head[8:], uint32(len(packet)))
		binary.LittleEndian.PutUint32(head[12:], uint32(len(packet)))
		pieces = append(pieces, head, packet)
	}
	for batch := range slices.Chunk(pieces, 1024) { // IOV_MAX
		if err := writeAll(int(c.file.Fd()), batch); err != nil {
			return fmt.Errorf("write %s: %w", c.path, err)
		}
	}
	return nil
}

// writeAll is writev to its end.
func writeAll(fd int, pieces [][]byte) error {
	for len(pieces) > 0 {
		n, err := unix.Writev(fd, pieces)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		n = max(n, 0)
		for len(pieces) > 0 && n >= len(pieces[0]) {
			n, pieces = n-len(pieces[0]), pieces[1:]
		}
		if len(pieces) > 0 {
			pieces[0] = pieces[0][n:]
		}
	}
	return nil
}

// close ends the recorder and waits for it.
func (c *capture) close() error {
	c.ring.stop()
	for range c.flushed { // until the recorder closes it
	}
	return errors.Join(c.ring.close(), c.file.Close())
}

// read shows every TCP segment recorded so far to see, in order. It fails if a
// packet was missed: what is not there may then have been there.
func (c *capture) read(see func(segment) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.flush(); err != nil {
		return fmt.Errorf("capture %s: %w", c.path, err)
	}
	if missed, err := c.ring.missed(); err != nil || missed > 0 {
		return errors.Join(err, fmt.Errorf("capture %s missed %d packets: it proves nothing", c.path, missed))
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
	check, err := newCaptureCheck(what, rest, c.addressesOf)
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
	err := errors.Join(had.flush(), had.close())
	fmt.Fprintln(out, filepath.Base(had.path))
	return err
}

// minText is how long a text must be to be looked for, in bytes: 100 MB of ciphertext
// have one of 4 bytes in 2 of 100 cases, and one of 6 in 4 of 10 million.
const minText = 6

// newCaptureCheck makes the check of that name; addressesOf says who A and B are.
func newCaptureCheck(what string, words []string, addressesOf func(string) ([]netip.Addr, error)) (captureCheck, error) {
	if what == "grep" && len(words) == 1 {
		if len(words[0]) < minText {
			return nil, fmt.Errorf("capture grep %q: want a text of %d bytes or more, a shorter one turns up in ciphertext by chance", words[0], minText)
		}
		return &grepCheck{text: []byte(words[0]), tails: map[flowKey][]byte{}}, nil
	}
	if len(words) < 2 {
		return nil, usageError("capture " + what)
	}
	var between between
	var err, err2 error
	between.client, err = addressesOf(words[0])
	between.server, err2 = addressesOf(words[1])
	if err := errors.Join(err, err2); err != nil {
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
