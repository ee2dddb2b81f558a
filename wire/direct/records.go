package direct

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
)

// suite is what a cipher suite of TLS 1.3 means for the record layer.
type suite struct {
	hash   func() hash.Hash
	keyLen int
}

// suiteOf knows the suites of AES-GCM; nil for any other.
func suiteOf(id uint16) *suite {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return &aes128
	case tls.TLS_AES_256_GCM_SHA384:
		return &aes256
	}
	return nil
}

var (
	aes128 = suite{sha256.New, 16}
	aes256 = suite{sha512.New384, 32}
)

// expand is HKDF-Expand-Label with an empty context (RFC 8446 §7.1).
func (s *suite) expand(secret []byte, label string, n int) ([]byte, error) {
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "...)
	info = append(info, label...)
	info = append(info, 0)
	return hkdf.Expand(s.hash, secret, string(info), n)
}

// keys protects one direction: a traffic secret and the number of the next
// record, and what follows from them. Not for concurrent use.
type keys struct {
	suite  *suite
	secret []byte
	key    [32]byte    // the first suite.keyLen of it
	aead   cipher.AEAD // nil while nothing is carried, see cipher
	iv     [12]byte
	nonce  [12]byte // scratch; a local one would escape to the heap with each record
	seq    uint64
}

func (k *keys) start(s *suite, secret []byte) error {
	key, err := s.expand(secret, "key", s.keyLen)
	if err != nil {
		return fmt.Errorf("derive a record key: %w", err)
	}
	iv, err := s.expand(secret, "iv", len(k.iv))
	if err != nil {
		return fmt.Errorf("derive a record nonce: %w", err)
	}
	k.suite, k.secret, k.seq, k.aead = s, secret, 0, nil
	copy(k.key[:], key)
	clear(key)
	copy(k.iv[:], iv)
	return nil
}

// cipher is made when it is needed: its tables are most of what a connection weighs, and
// are made anew in less than a microsecond.
func (k *keys) cipher() cipher.AEAD {
	if k.aead != nil {
		return k.aead
	}
	block, err := aes.NewCipher(k.key[:k.suite.keyLen])
	if err == nil {
		k.aead, err = cipher.NewGCM(block)
	}
	if err != nil { // only for a key of another length
		panic(fmt.Sprintf("direct: make a cipher: %v", err))
	}
	return k.aead
}

// doze lets go of the cipher until it is needed again.
func (k *keys) doze() { k.aead = nil }

// update moves to the next generation of keys (RFC 8446 §7.2).
func (k *keys) update() error {
	next, err := k.suite.expand(k.secret, "traffic upd", len(k.secret))
	if err != nil {
		return fmt.Errorf("derive a traffic secret: %w", err)
	}
	clear(k.secret)
	return k.start(k.suite, next)
}

// next is the nonce of the next record (RFC 8446 §5.3).
func (k *keys) next() []byte {
	binary.BigEndian.PutUint64(k.nonce[4:], binary.BigEndian.Uint64(k.iv[4:])^k.seq)
	copy(k.nonce[:4], k.iv[:4])
	k.seq++
	return k.nonce[:]
}

// seal appends one record with p, at most maxPlain bytes, to b, whose capacity
// must suffice. p is copied next to its content type and sealed there: memory
// in the nearest cache is written at a twentieth of the cipher's cost.
func (k *keys) seal(b []byte, typ byte, p []byte) []byte {
	n := len(p) + 1 + sealOverhead
	b = append(b, typeApplication, 3, 3, byte(n>>8), byte(n))
	head := b[len(b)-recordHeader:]
	start := len(b)
	b = append(append(b, p...), typ)
	return k.cipher().Seal(b[:start], k.next(), b[start:], head)
}

var (
	errNotSealed = errors.New("record is not encrypted")
	errNoContent = errors.New("record has no content type")
)

// open opens a record into dst, which must not overlap it unless it is exactly
// its own payload, and returns the content and its type.
func (k *keys) open(dst, record []byte) ([]byte, byte, error) {
	if record[0] != typeApplication {
		return nil, 0, fmt.Errorf("%w: outer type %d", errNotSealed, record[0])
	}
	p, err := k.cipher().Open(dst[:0], k.next(), record[recordHeader:], record[:recordHeader])
	if err != nil {
		return nil, 0, fmt.Errorf("record %d: %w", k.seq-1, err)
	}
	for i := len(p) - 1; i >= 0; i-- {
		if p[i] != 0 { // RFC 8446 §5.4: zeros behind the type are padding
			if i > maxPlain {
				return nil, 0, fmt.Errorf("%w: %d bytes of content", errTooLong, i)
			}
			return p[:i], p[i], nil
		}
	}
	return nil, 0, errNoContent
}
