/* Compiles and links where intel-ipsec-mb is usable. */
#include "shim.h"

int main(void)
{
        return imb_get_version() >= IMB_VERSION_NUM ? 0 : 1;
}
