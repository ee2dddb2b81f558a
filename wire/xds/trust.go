package xds

import (
	"fmt"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// encodeTrust returns nil where nothing is said.
func encodeTrust(t mesh.Trust) *message.Trust {
	if len(t.Revoked) == 0 && t.MaxAge == 0 {
		return nil
	}
	m := &message.Trust{MaxAge: t.MaxAge.Milliseconds()}
	for _, id := range t.Revoked {
		m.Revoked = append(m.Revoked, id.String())
	}
	return m
}

// decodeTrust refuses the whole for one identity that is none: who is meant has to be known.
func decodeTrust(m *message.Trust) (t mesh.Trust, err error) {
	if age := m.GetMaxAge(); age < 0 || age > int64(maxAge/time.Millisecond) || len(m.GetRevoked()) > mesh.MaxRevoked {
		return t, fmt.Errorf("age of %d ms and %d revoked identities: want at most %s and %d", age, len(m.GetRevoked()), maxAge, mesh.MaxRevoked)
	}
	t.MaxAge = time.Duration(m.GetMaxAge()) * time.Millisecond
	for _, text := range m.GetRevoked() {
		id, err := mesh.ParseID(text)
		if err != nil {
			return mesh.Trust{}, err
		}
		t.Revoked = append(t.Revoked, id)
	}
	return t, nil
}

// maxAge bounds mesh.Trust.MaxAge, so that no clock overflows.
const maxAge = 10 * 365 * 24 * time.Hour
