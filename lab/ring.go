package lab

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is a packet socket whose packets the kernel puts into memory that it shares
// with us (packet(7), TPACKET_V3). A plain socket has too small a buffer for an
// ordinary user, and loses what comes while nobody reads.
type ring struct {
	fd, sender int
	memory     []byte
	// ifindex is the link that is listened to, 0 for all but lo; over markOn go
	// our marks.
	ifindex, markOn int
	// token is what our marks carry, so that a mark of another capture is not ours.
	token   [16]byte
	stopped atomic.Bool
	drops   atomic.Uint32
}

const (
	blockSize  = 1 << 20
	blockCount = 256
	frameSize  = 2048 // of no meaning in version 3, but it has to divide a block
	// retireAfter is how many milliseconds a block may stay half full.
	retireAfter = 50

	// Offsets in a block's head and a packet's head, of linux/if_packet.h.
	blockStatus, blockPackets, blockFirst = 8, 12, 16
	packetNext, packetLength, packetStart = 0, 12, 24
	// Behind a packet's head is a sockaddr_ll.
	packetLink, packetKind = 48 + 4, 48 + 10

	// markType is an EtherType for local experiments (IEEE 802).
	markType = 0x88b5
)

// openRing listens to a link of the calling thread's namespace, or to all of them
// but lo if link is "": also to those that are made later.
func openRing(link string) (*ring, error) {
	over := link
	if link == "" {
		over = "lo"
	}
	dev, err := net.InterfaceByName(over)
	if err != nil {
		return nil, err
	}
	r := &ring{fd: -1, sender: -1, markOn: dev.Index}
	if link != "" {
		r.ifindex = dev.Index
	}
	rand.Read(r.token[:])
	if err := r.open(); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *ring) open() (err error) {
	// Protocol 0: nothing arrives until it is bound, when the ring is there.
	if r.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("packet socket (needs CAP_NET_RAW): %w", err)
	}
	if r.sender, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	if err := unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V3); err != nil {
		return fmt.Errorf("packet version: %w", err)
	}
	request := &unix.TpacketReq3{
		Block_size: blockSize, Block_nr: blockCount, Frame_size: frameSize, Frame_nr: blockSize / frameSize * blockCount,
		Retire_blk_tov: retireAfter,
	}
	if err := unix.SetsockoptTpacketReq3(r.fd, unix.SOL_PACKET, unix.PACKET_RX_RING, request); err != nil {
		return fmt.Errorf("ring of %d MiB: %w", blockSize*blockCount>>20, err)
	}
	r.memory, err = unix.Mmap(r.fd, 0, blockSize*blockCount, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the ring: %w", err)
	}
	return unix.Bind(r.fd, &unix.SockaddrLinklayer{Protocol: swap(unix.ETH_P_ALL), Ifindex: r.ifindex})
}

func swap(v uint16) uint16 { return v>>8 | v<<8 }

// read hands over packets in their order, a block at a time, until stop; see must not
// keep them. marks is how many of our marks were among them, which are left out.
func (r *ring) read(see func(packets [][]byte, marks int) error) error {
	for block := 0; ; block = (block + 1) % blockCount {
		memory := r.memory[block*blockSize : (block+1)*blockSize]
		status := (*uint32)(unsafe.Pointer(&memory[blockStatus]))
		for atomic.LoadUint32(status)&unix.TP_STATUS_USER == 0 {
			if r.stopped.Load() {
				return nil
			}
			p := []unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(p, 50); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("wait for packets: %w", err)
			}
		}
		if err := see(r.packets(memory)); err != nil {
			return err
		}
		atomic.StoreUint32(status, unix.TP_STATUS_KERNEL)
	}
}

func (r *ring) packets(block []byte) (packets [][]byte, marks int) {
	at := binary.NativeEndian.Uint32(block[blockFirst:])
	for range binary.NativeEndian.Uint32(block[blockPackets:]) {
		head := block[at:]
		start := uint32(binary.NativeEndian.Uint16(head[packetStart:]))
		packet := head[start : start+binary.NativeEndian.Uint32(head[packetLength:])]
		switch {
		case r.isMark(packet):
			if head[packetKind] == unix.PACKET_OUTGOING { // over lo it comes back, too
				marks++
			}
		case r.ifindex == 0 && binary.NativeEndian.Uint32(head[packetLink:]) == uint32(r.markOn):
		default:
			packets = append(packets, packet)
		}
		at += binary.NativeEndian.Uint32(head[packetNext:])
	}
	return packets, marks
}

// mark sends a frame of our own over the link. When it comes out of the ring, so
// has everything that passed before it. Whoever gets it does not know what it is.
func (r *ring) mark() error {
	frame := append(make([]byte, 12, 60), markType>>8, markType&0xff)
	frame[0], frame[6] = 2, 2 // locally administered addresses
	frame = append(frame, r.token[:]...)
	to := &unix.SockaddrLinklayer{Protocol: swap(markType), Ifindex: r.markOn}
	for deadline := time.Now().Add(patience); ; {
		err := unix.Sendto(r.sender, frame, 0, to)
		if !errors.Is(err, unix.ENOBUFS) || time.Now().After(deadline) {
			return err
		}
	}
}

func (r *ring) isMark(packet []byte) bool {
	return len(packet) >= 30 && binary.BigEndian.Uint16(packet[12:]) == markType && bytes.Equal(packet[14:30], r.token[:])
}

// missed is how many packets found no room so far.
func (r *ring) missed() (uint32, error) {
	stats, err := unix.GetsockoptTpacketStatsV3(r.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, fmt.Errorf("statistics of the ring: %w", err)
	}
	return r.drops.Add(stats.Drops), nil // reading sets the kernel's to zero
}

// stop has read return soon; close only after that.
func (r *ring) stop() { r.stopped.Store(true) }

func (r *ring) close() error {
	var errs []error
	if r.memory != nil {
		errs = append(errs, unix.Munmap(r.memory))
	}
	for _, fd := range []int{r.fd, r.sender} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}
