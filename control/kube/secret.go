package kube

import (
	"context"
	"fmt"
	"io/fs"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// requestLimit bounds one request to the API server.
const requestLimit = 10 * time.Second

// KeySecret keeps pairs of certificate and key in one Secret: it is a store of
// control/ca. Several processes may use it at once: who saves what another one
// has changed meanwhile is told so.
type KeySecret struct {
	client          kubernetes.Interface
	namespace, name string
	// version is that of the Secret when it was last read or written; "" means
	// that there was none.
	version string
}

// NewKeySecret reads nothing. It needs create in the namespace, and get and update of
// that one Secret.
func NewKeySecret(c kubernetes.Interface, namespace, name string) *KeySecret {
	return &KeySecret{client: c, namespace: namespace, name: name}
}

func (s *KeySecret) String() string { return "Secret " + s.namespace + "/" + s.name }

// Load returns nil for what is not there.
func (s *KeySecret) Load(name string) (certPEM, keyPEM []byte, err error) {
	secret, err := s.get()
	if secret == nil {
		return nil, nil, err
	}
	return secret.Data[name+".pem"], secret.Data[name+".key"], nil
}

// Save keeps both at once, beside what else the Secret has. The error wraps
// fs.ErrExist if the Secret has changed since it was last read here.
func (s *KeySecret) Save(name string, certPEM, keyPEM []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), requestLimit)
	defer cancel()
	known := s.version
	secret, err := s.get()
	if err != nil {
		return err
	}
	if s.version != known {
		return s.conflict()
	}
	if secret == nil {
		secret = &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: s.name, Labels: map[string]string{"app.kubernetes.io/part-of": "tacit"}},
			Type:       "tacit.dev/ca",
			Data:       map[string][]byte{name + ".pem": certPEM, name + ".key": keyPEM},
		}
		secret, err = s.client.CoreV1().Secrets(s.namespace).Create(ctx, secret, metav1.CreateOptions{})
	} else {
		secret.Data[name+".pem"], secret.Data[name+".key"] = certPEM, keyPEM
		secret, err = s.client.CoreV1().Secrets(s.namespace).Update(ctx, secret, metav1.UpdateOptions{})
	}
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return s.conflict()
	}
	if err != nil {
		return fmt.Errorf("save %s to %v: %w", name, s, err)
	}
	s.version = secret.ResourceVersion
	return nil
}

// get is nil, and no error, if there is no such Secret.
func (s *KeySecret) get() (*corev1.Secret, error) {
	ctx, cancel := context.WithTimeout(context.Background(), requestLimit)
	defer cancel()
	secret, err := s.client.CoreV1().Secrets(s.namespace).Get(ctx, s.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		s.version = ""
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %v: %w", s, err)
	}
	if secret.Data == nil {
		secret.Data = make(map[string][]byte)
	}
	s.version = secret.ResourceVersion
	return secret, nil
}

func (s *KeySecret) conflict() error {
	return fmt.Errorf("%v was changed by another process: %w", s, fs.ErrExist)
}
