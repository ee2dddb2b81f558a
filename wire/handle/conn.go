package handle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// sendTimeout is how long a message may wait for a peer that does not read. A
// peer that is slower than that is taken for dead.
const sendTimeout = 5 * time.Second

// maxControl is room for as many descriptors as the kernel lets one message
// carry (SCM_MAX_FD), so that none is ever lost by truncation.
const maxControl = 253 * 4

// Conn is one end of the conversation. Send may be called by several goroutines
// at once, Receive by one at a time; Close ends both.
type Conn struct {
	unix *net.UnixConn
	buf  []byte // owned by Receive
	oob  []byte // owned by Receive
}

func newConn(c *net.UnixConn) *Conn {
	return &Conn{unix: c, buf: make([]byte, MaxMessage+1), oob: make([]byte, unix.CmsgSpace(maxControl))}
}

// HeldPod is a pod that the proxy serves already, with its listeners. Files
// stay the caller's and are not closed.
type HeldPod struct {
	UID   string
	Roles []Role
	Files []int
}

// Dial connects the proxy to the agent at path, and tells it which pods are
// served already. It does not try again.
func Dial(ctx context.Context, path string, held ...HeldPod) (*Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", err)
	}
	c := newConn(nc.(*net.UnixConn))
	for _, h := range held {
		if err := c.Send(Message{Kind: Held, UID: h.UID, Roles: h.Roles}, h.Files...); err != nil {
			c.Close()
			return nil, err
		}
	}
	if err := c.Send(Message{Kind: Hello}); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Send writes one message with its files, which it does not close. It blocks
// for at most a few seconds. After an error the connection is of no use.
func (c *Conn) Send(m Message, files ...int) error {
	b, err := encode(m, len(files))
	if err != nil {
		return err
	}
	var oob []byte
	if len(files) > 0 {
		oob = unix.UnixRights(files...)
	}
	if err := c.unix.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return fmt.Errorf("send %s of %s: %w", m.Kind, m.UID, err)
	}
	if _, _, err := c.unix.WriteMsgUnix(b, oob, nil); err != nil {
		return fmt.Errorf("send %s of %s with %d files: %w", m.Kind, m.UID, len(files), err)
	}
	return nil
}

// Receive blocks for the next message. Its files are the caller's, who closes
// them, and close on exec. At the orderly end of the peer the error is io.EOF,
// after Close it is net.ErrClosed. After any error the connection is of no use.
func (c *Conn) Receive() (Message, []int, error) {
	n, oobn, flags, _, err := c.unix.ReadMsgUnix(c.buf, c.oob)
	if errors.Is(err, io.EOF) {
		return Message{}, nil, io.EOF
	}
	if err != nil {
		return Message{}, nil, err
	}
	files, err := rights(c.oob[:oobn])
	if err == nil && (flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > MaxMessage) {
		err = fmt.Errorf("message of more than %d bytes or %d files", MaxMessage, MaxFiles)
	}
	var m Message
	if err == nil {
		m, err = decode(c.buf[:n], len(files))
	}
	if err != nil {
		closeAll(files)
		return Message{}, nil, fmt.Errorf("receive: %w", err)
	}
	return m, files, nil
}

// Close ends the conversation. It may be called more than once.
func (c *Conn) Close() error {
	if err := c.unix.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// SetReadDeadline bounds the next Receive; the zero time removes the bound.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.unix.SetReadDeadline(t) }

// rights takes all descriptors out of control messages, also when it finds
// something else among them.
func rights(oob []byte) (files []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	for i := range msgs {
		fds, e := unix.ParseUnixRights(&msgs[i])
		files = append(files, fds...)
		err = errors.Join(err, e)
	}
	return files, err
}

func closeAll(files []int) {
	for _, fd := range files {
		DoNotLinger(fd)
		unix.Close(fd)
	}
}

// DoNotLinger is called before a descriptor is closed that came from somebody who is not trusted:
// to close a socket with SO_LINGER waits for as long as that says.
func DoNotLinger(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
}

// Listener is the agent's end of the door.
type Listener struct {
	unix *net.UnixListener
	uid  int
}

// Listen makes the socket at path, in place of one that an earlier agent left.
// Only uid, and root, can connect; a negative uid means our own.
func Listen(path string, uid int) (*Listener, error) {
	if uid < 0 {
		uid = os.Geteuid()
	}
	// Made aside and renamed: there is no moment with the wrong owner or mode.
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen for the proxy: %w", err)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: tmp, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("listen for the proxy: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Chown(tmp, uid, -1), os.Rename(tmp, path)); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for the proxy at %s as uid %d: %w", path, uid, err)
	}
	return &Listener{unix: l, uid: uid}, nil
}

// Accept blocks for the next proxy. A peer with another uid is turned away.
func (l *Listener) Accept() (*Conn, error) {
	for {
		nc, err := l.unix.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(nc); err == nil && (uid == 0 || uid == l.uid) {
			return newConn(nc), nil
		}
		nc.Close()
	}
}

func peerUID(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, err
	}
	return int(cred.Uid), nil
}

// Close stops listening. The file stays where it is: the next agent replaces
// it, and a late remove could hit its successor's.
func (l *Listener) Close() error { return l.unix.Close() }
