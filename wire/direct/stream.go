package direct

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

// stream carries bytes after the handshake. One goroutine may call read and
// await, another one write and end. There are two: records, which is ours, and
// cryptoTLS.
type stream interface {
	// read gives io.EOF after close_notify, ErrTruncated at any other end.
	read(p []byte) (int, error)
	// await blocks, without a buffer, until read would not.
	await() error
	write(p []byte) (int, error)
	// end sends close_notify, and FIN in the same packet if fin is set.
	end(fin bool) error
}

const (
	alertCloseNotify  = 0
	alertUserCanceled = 90

	msgNewSessionTicket = 4
	msgKeyUpdate        = 24

	// rekeyAfter records, far before the 2^24.5 of RFC 8446 §5.5, a direction
	// gets another key.
	rekeyAfter = 1 << 23
	// maxUseless records in a row may bring nothing; crypto/tls has the same bound.
	maxUseless = 16
)

var errUseless = errors.New("too many records in a row that bring nothing")

// records is the record layer of this package: RFC 8446 §5 with AES-GCM.
type records struct {
	c   *net.TCPConn
	raw syscall.RawConn
	in  *inbox

	// The reading side.
	open    keys
	plain   []byte // opened, not yet read, in the memory of the first record of in
	useless int
	readErr error        // what read says from now on
	keeps   bool         // an empty record ends what is carried now, and the connection goes on
	over    bool         // close_notify has come
	tickets *ticketTaker // nil when no more tickets are wanted
	answer  *atomic.Bool // the peer asked for a KeyUpdate of ours; the writing side sends it

	// The writing side.
	seal     keys
	rekey    uint64
	lead     []byte // what the handshake, or tryWrite, left unsent goes out with the next write
	leadBuf  []byte
	out      socket.Sender
	writeErr error // a record was cut: nothing may follow it
}

// newRecords takes over from crypto/tls, which does not touch the socket again.
func newRecords(hs *handshake, client bool) (*records, error) {
	s := &records{
		c: hs.h.TCPConn, raw: hs.h.in.raw, in: hs.h.in,
		keeps: hs.keeps, rekey: rekeyAfter, answer: new(atomic.Bool),
		lead: hs.h.out[hs.h.sent:], leadBuf: hs.h.buf,
	}
	s.out.Bind(s.raw)
	hs.h.sealed = true
	mine, theirs := hs.keys.server, hs.keys.client
	if client {
		mine, theirs = theirs, mine
	}
	st := suiteOf(hs.peer.CipherSuite)
	if err := errors.Join(s.seal.start(st, mine), s.open.start(st, theirs)); err != nil {
		return nil, err
	}
	if client && !hs.peer.Resumed {
		s.tickets = &ticketTaker{hs.tls, hs.h}
	}
	if !client {
		s.seal.seq = sealedBy(s.seal, hs.h.out)
	}
	return s, nil
}

// sealedBy counts the records at the end of out that were sealed with k:
// the tickets that crypto/tls sent after its Finished. That it is counted by
// opening them, and not by knowing how many there are, keeps this right
// whatever crypto/tls does. k is a copy; it is only tried.
func sealedBy(k keys, out []byte) uint64 {
	scratch := lend(smallSize)
	defer takeBack(scratch)
	var count uint64
	for len(out) >= recordHeader {
		n := recordHeader + int(out[3])<<8 + int(out[4])
		if n > len(out) {
			break
		}
		if out[0] == typeApplication {
			k.seq = count
			if _, _, err := k.open(scratch, out[:n]); err == nil {
				count++
			}
		}
		out = out[n:]
	}
	return count
}

// ticketTaker lets crypto/tls put a session ticket into the session cache of
// the configuration: only it knows the secret that belongs to it.
type ticketTaker struct {
	conn *tls.Conn
	h    *handshaker
}

// take gives crypto/tls one sealed record. The tickets are the first records of
// the stream, so it counts them as the record layer does. It has no more than
// them to read, and its error says only that.
func (t *ticketTaker) take(record []byte) {
	var none [1]byte
	t.h.feed = record
	_, _ = t.conn.Read(none[:])
}

func (s *records) read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if len(s.plain) > 0 {
			return s.readPlain(p), nil
		}
		if s.readErr != nil {
			return 0, s.readErr
		}
		n, err := s.openInto(p)
		s.readErr = err
		if n > 0 {
			return n, nil
		}
		if err == nil {
			if err := s.fill(); err != nil {
				return 0, err
			}
		}
	}
}

// readPlain gives what a short p left of a record.
func (s *records) readPlain(p []byte) int {
	n := copy(p, s.plain)
	s.plain = s.plain[n:]
	if len(s.plain) == 0 {
		s.dropRecord()
	}
	return n
}

// dropRecord consumes the first record. Its header is intact when it is opened in place.
func (s *records) dropRecord() {
	b := s.in.bytes()
	s.in.consume(recordHeader + int(b[3])<<8 + int(b[4]))
}

// fill reads from the socket. A deadline that has passed is no lasting error.
func (s *records) fill() error {
	err := s.in.fill()
	if err == io.EOF {
		err = ErrTruncated
	}
	if err != nil && !isTimeout(err) {
		s.readErr = err
	}
	return err
}

// openInto opens the records that are there, as far as p has room.
func (s *records) openInto(p []byte) (int, error) {
	n := 0
	for {
		record, err := s.in.record()
		if record == nil || err != nil {
			return n, err
		}
		if n > 0 && len(record)-overhead > len(p)-n {
			return n, nil
		}
		m, err := s.openOne(p[n:], record)
		n += m
		if err != nil || len(s.plain) > 0 {
			return n, err
		}
	}
}

// openOne opens one record straight into p if all of it fits, else where it is.
func (s *records) openOne(p, record []byte) (int, error) {
	dst := record[recordHeader:]
	inPlace := len(p) < len(record)-recordHeader-16
	if !inPlace {
		dst = p
	}
	var sealed []byte
	if s.tickets != nil {
		sealed = append(sealed, record...)
	}
	plain, typ, err := s.open.open(dst, record)
	if err != nil {
		return 0, err
	}
	if typ != typeApplication || len(plain) == 0 {
		err := s.control(typ, plain, sealed)
		s.dropRecord()
		return 0, err
	}
	s.useless, s.tickets = 0, nil
	if !inPlace {
		s.dropRecord()
		return len(plain), nil
	}
	n := copy(p, plain)
	if s.plain = plain[n:]; len(s.plain) == 0 {
		s.dropRecord()
	}
	return n, nil
}

// control handles a record without bytes of the application. sealed is the record
// as it came, if tickets are wanted.
func (s *records) control(typ byte, plain, sealed []byte) error {
	if typ == typeApplication && s.keeps {
		return io.EOF
	}
	if s.useless++; s.useless > maxUseless {
		return errUseless
	}
	switch typ {
	case typeApplication:
		return nil
	case typeAlert:
		err := alert(plain)
		s.over = err == io.EOF
		return err
	case typeHandshake:
		return s.handshake(plain, sealed)
	}
	return fmt.Errorf("record of unknown type %d", typ)
}

func alert(plain []byte) error {
	switch {
	case len(plain) != 2:
		return fmt.Errorf("alert of %d bytes", len(plain))
	case plain[1] == alertCloseNotify:
		return io.EOF
	case plain[1] == alertUserCanceled:
		return nil
	}
	return fmt.Errorf("remote error: %w", tls.AlertError(plain[1]))
}

// handshake handles the messages that may come after the handshake. They are
// never split over records by anybody.
func (s *records) handshake(plain, sealed []byte) error {
	for len(plain) > 0 {
		if len(plain) < 4 {
			return errors.New("handshake message is cut")
		}
		typ, n := plain[0], 4+int(plain[1])<<16+int(plain[2])<<8+int(plain[3])
		if n > len(plain) {
			return errors.New("handshake message is cut")
		}
		body := plain[4:n]
		plain = plain[n:]
		switch {
		case typ == msgNewSessionTicket && len(plain) == 0 && s.tickets != nil:
			s.tickets.take(sealed)
		case typ == msgNewSessionTicket:
		case typ == msgKeyUpdate && len(body) == 1 && body[0] <= 1 && len(plain) == 0:
			s.tickets = nil
			if body[0] == 1 {
				s.answer.Store(true)
			}
			return s.open.update()
		default:
			return fmt.Errorf("unexpected handshake message %d of %d bytes", typ, len(body))
		}
	}
	return nil
}

func (s *records) await() error {
	for len(s.plain) == 0 && s.readErr == nil {
		if record, err := s.in.record(); record != nil || err != nil {
			return nil
		}
		if err := s.fill(); err != nil {
			if s.readErr != nil {
				return nil // read will say it
			}
			return err
		}
	}
	return nil
}

// write with nothing sends what tryWrite could not.
func (s *records) write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, s.flushLead(smallSize)
	}
	done := 0
	for done < len(p) {
		n, err := s.writeBatch(p[done:])
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// writeBatch seals as many full records of p as a buffer holds, and writes once.
func (s *records) writeBatch(p []byte) (int, error) {
	if s.writeErr != nil {
		return 0, s.writeErr
	}
	if err := s.flushLead(len(p)); err != nil {
		return 0, err
	}
	buf := lendFor(len(p))
	defer takeBack(buf)
	n := min(len(p), fits(buf))
	b, err := s.sealInto(buf[:0], p[:n])
	if err == nil {
		_, err = s.out.Send(b)
	}
	return n, s.broken(err)
}

// lendFor gives a buffer for what n bytes become as full records, or for as many as fit.
func lendFor(n int) []byte { return lend((n + fullPlain - 1) / fullPlain * fullRecord) }

// fits is how many bytes are full records in buf.
func fits(buf []byte) int { return len(buf) / fullRecord * fullPlain }

// sealInto appends to b what is to be sent before p, and p as records.
func (s *records) sealInto(b, p []byte) ([]byte, error) {
	if s.lead != nil {
		b = append(b, s.lead...)
		s.dropLead()
	}
	b, err := s.freshKey(b)
	if err != nil {
		return nil, err
	}
	for len(p) > 0 {
		n := min(len(p), fullPlain)
		b = s.seal.seal(b, typeApplication, p[:n])
		p = p[n:]
	}
	return b, nil
}

func (s *records) broken(err error) error {
	if err != nil {
		s.writeErr = err
	}
	return err
}

// leadFits reports whether what is left to be sent goes well with n bytes more.
func (s *records) leadFits(n int) bool {
	return s.lead == nil || len(s.lead)+n+2*overhead+5 <= smallSize
}

// flushLead sends what is left to be sent, unless it goes well with n bytes more.
func (s *records) flushLead(n int) error {
	if s.leadFits(n) {
		return nil
	}
	_, err := s.out.Send(s.lead)
	s.dropLead()
	return s.broken(err)
}

func (s *records) dropLead() {
	takeBack(s.leadBuf)
	s.lead, s.leadBuf = nil, nil
}

// freshKey appends a KeyUpdate if the key has served for long enough, or the peer asked for one.
func (s *records) freshKey(b []byte) ([]byte, error) {
	if s.seal.seq < s.rekey && !s.answer.Load() {
		return b, nil
	}
	s.answer.Store(false)
	b = s.seal.seal(b, typeHandshake, []byte{msgKeyUpdate, 0, 0, 1, 0})
	return b, s.seal.update()
}

func (s *records) end(fin bool) error {
	if s.writeErr != nil && s.writeErr != errFinished {
		return s.writeErr
	}
	if err := s.flushLead(smallSize); err != nil {
		return err
	}
	s.writeErr = net.ErrClosed
	b := s.seal.seal(make([]byte, 0, overhead+2), typeAlert, []byte{1, alertCloseNotify})
	if !fin {
		_, err := s.out.Send(b)
		return err
	}
	return endWith(s.c, s.raw, b)
}

// finish sends an empty record: the end of what is carried now, and not of the connection.
func (s *records) finish() error {
	if s.writeErr != nil {
		return s.writeErr
	}
	if err := s.flushLead(smallSize); err != nil {
		return err
	}
	s.writeErr = errFinished
	_, err := s.out.Send(s.seal.seal(make([]byte, 0, overhead), typeApplication, nil))
	return err
}

var errFinished = errors.New("direct: written to after Finish")

// again begins anew after finish of both sides.
func (s *records) again() { s.readErr, s.writeErr = nil, nil }

// endWith sends b and FIN in one packet: MSG_MORE holds b back until the FIN is there.
func endWith(c *net.TCPConn, raw syscall.RawConn, b []byte) error {
	var sendErr error
	err := raw.Write(func(fd uintptr) bool {
		for len(b) > 0 && sendErr == nil {
			n, err := unix.SendmsgN(int(fd), b, nil, nil, unix.MSG_MORE|unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			switch err {
			case nil:
				b = b[n:]
			case unix.EINTR:
			case unix.EAGAIN:
				return false
			default:
				sendErr = os.NewSyscallError("sendmsg", err)
			}
		}
		return true
	})
	if err = errors.Join(err, sendErr); err != nil {
		return err
	}
	return c.CloseWrite()
}

// cryptoTLS leaves the records to crypto/tls: in FIPS mode, and for suites that
// records does not know.
type cryptoTLS struct {
	conn *tls.Conn
	h    *handshaker
	more bool   // the last read filled its p: crypto/tls may hold the rest of a record
	next []byte // what await had to read to find out
	one  [1]byte
}

func newCryptoTLS(hs *handshake) (*cryptoTLS, error) {
	err := hs.h.flush()
	hs.h.through = true
	takeBack(hs.h.buf)
	hs.h.buf, hs.h.out, hs.h.sent = nil, nil, 0
	return &cryptoTLS{conn: hs.tls, h: hs.h}, err
}

func (s *cryptoTLS) read(p []byte) (int, error) {
	if len(s.next) > 0 && len(p) > 0 {
		s.next = nil
		p[0] = s.one[0]
		return 1, nil
	}
	n, err := s.conn.Read(p)
	s.more = n == len(p)
	return n, err
}

func (s *cryptoTLS) write(p []byte) (int, error) { return s.conn.Write(p) }

func (s *cryptoTLS) await() error {
	if len(s.next) > 0 || len(s.h.in.bytes()) > 0 || s.h.err != nil || s.holdsMore() {
		return nil
	}
	if err := s.h.fill(); err != nil && s.h.err == nil {
		return err
	}
	return nil
}

// holdsMore finds out whether crypto/tls still holds bytes of a record: it
// reads one from crypto/tls, which gets nothing from the socket meanwhile.
func (s *cryptoTLS) holdsMore() bool {
	if !s.more {
		return false
	}
	s.h.dry = true
	n, _ := s.conn.Read(s.one[:])
	s.h.dry = false
	s.next, s.more = s.one[:n], n > 0
	return n > 0
}

func (s *cryptoTLS) end(fin bool) error {
	err := s.conn.CloseWrite()
	if err == nil && fin {
		err = s.h.CloseWrite()
	}
	return err
}
